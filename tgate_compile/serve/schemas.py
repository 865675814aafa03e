"""Requests, responses and errors of the HTTP API, in the format of OpenAI's images API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from starlette.responses import JSONResponse

from tgate_compile._errors import ConfigurationError, TGateError
from tgate_compile.methods.method import checked_gate_step

#: The largest integer that every JSON reader keeps exactly; the seeds of all images of a request stay below it.
LARGEST_SEED = 2**53 - 1
#: The largest number of partial images, as in OpenAI's API.
MOST_PARTIAL_IMAGES = 3

_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest request that a server accepts.

    Attributes:
        body: bytes of a request's body.
        body_seconds: time in which the body must arrive.
        prompt: characters of a prompt.
        images: images per request.
        steps: denoising steps.
        side: pixels of an image's width and height.
        multiple: width and height must be multiples of this, which the model determines.
    """

    body: int = 64 * 1024
    body_seconds: float = 10.0
    prompt: int = 4000
    images: int = 8
    steps: int = 200
    side: int = 2048
    multiple: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigurationError(f"The limit {field.name} must be a positive number, but got {value!r}.")


class ApiError(TGateError):
    """An error that is sent as the response to a request.

    Attributes:
        status: the HTTP status.
        message: what is wrong and what to do.
        kind: the error's type in OpenAI's format.
        param: the request's parameter that caused it.
        code: a short name for programs.
        retry_after: the seconds after which to try again; None sends no such header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's format."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        """Return the response to the client."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body(), self.status, headers)


class Json(JSONResponse):
    """A JSON response in ASCII: parameter names of a malformed request may contain characters that UTF-8 lacks."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


_LoraName = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]


class ImageRequest(BaseModel):
    """A request for images. `request_model` adds the server's limits."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())

    prompt: Annotated[str, Field(description="A description of the images.")]
    model: Annotated[
        str | None,
        Field(description="The name of the server's only model, as `GET /v1/models` returns it. It may be left out."),
    ] = None
    n: Annotated[int | None, Field(description="The number of images to generate; the default is 1.")] = None
    size: Annotated[
        Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None,
        Field(
            description="The width and height in pixels, such as `512x512`. The default, `auto`, is the model's own."
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json"] | None,
        Field(description="The form of the images in the response. Only base64 is supported."),
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Field(description="The file format of the images; the default is `png`.")
    ] = None
    output_compression: Annotated[
        Annotated[int, Field(ge=0, le=100)] | None,
        Field(description="The quality of `jpeg` and `webp` files, from 0 to 100; the default is 100, the best."),
    ] = None
    quality: Annotated[
        Literal["auto", "standard"] | None,
        Field(description="Accepted and ignored. Set `steps` to choose the quality."),
    ] = None
    background: Annotated[
        Literal["auto", "opaque"] | None, Field(description="Accepted and ignored: the model generates opaque images.")
    ] = None
    style: Annotated[None, Field(description="Not supported. Describe the style in the prompt.")] = None
    moderation: Annotated[None, Field(description="Not supported. The server does not moderate prompts or images.")] = (
        None
    )
    user: Annotated[str | None, Field(max_length=512, description="Accepted and ignored.")] = None
    safety_identifier: Annotated[str | None, Field(max_length=512, description="Accepted and ignored.")] = None
    stream: Annotated[
        bool | None, Field(description="Whether to send the images, and previews of them, as server-sent events.")
    ] = None
    partial_images: Annotated[
        Annotated[int, Field(ge=0, le=MOST_PARTIAL_IMAGES)] | None,
        Field(description="The number of previews of each image. It needs `stream`."),
    ] = None
    negative_prompt: Annotated[str | None, Field(description="A description of what the images should not show.")] = (
        None
    )
    seed: Annotated[
        Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None,
        Field(
            description="The seed of the first image; the seed of each further image is one higher. The default is "
            "random. The response contains the seed of each image."
        ),
    ] = None
    steps: Annotated[int | None, Field(description="The number of denoising steps; the default is the server's.")] = (
        None
    )
    guidance: Annotated[
        Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None,
        Field(description="The guidance scale; the default is the server's. Values up to 1 switch guidance off."),
    ] = None
    gate_step: Annotated[
        Annotated[
            int | float,
            AfterValidator(checked_gate_step),
            Field(
                json_schema_extra={
                    "anyOf": [
                        {"type": "integer", "minimum": 1},
                        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                    ]
                }
            ),
        ]
        | None,
        Field(
            description="The number of steps that run in full before T-GATE reuses results, or their fraction; the "
            "default is the server's."
        ),
    ] = None
    lora: Annotated[
        _LoraName | dict[_LoraName, Annotated[float, Field(allow_inf_nan=False)]] | None,
        Field(
            description="The name of a LoRA that the server has loaded, or an object with the weights of several. "
            "By default none is active."
        ),
    ] = None

    @property
    def count(self) -> int:
        """The number of images."""
        return self.n or 1

    @property
    def format(self) -> Literal["png", "jpeg", "webp"]:
        """The file format of the images."""
        return self.output_format or "png"

    @property
    def adapters(self) -> dict[str, float] | None:
        """The weights of the LoRA adapters by name, or None for those that the server uses by default."""
        return {self.lora: 1.0} if isinstance(self.lora, str) else self.lora

    def sides(self, limits: Limits) -> tuple[int, int] | None:
        """Return the width and height, or None for the model's own.

        Raises:
            ApiError: they are too large, or the model cannot generate images of this size.
        """
        if self.size is None or self.size == "auto":
            return None
        width, height = map(int, self.size.split("x"))
        if max(width, height) > limits.side:
            largest = f"{limits.side}x{limits.side}"
            raise ApiError(400, f"size must be at most {largest}, but got {self.size}.", param="size")
        if width % limits.multiple or height % limits.multiple:
            raise ApiError(
                400,
                f"The sides of size must be multiples of {limits.multiple}, but got {self.size}.",
                param="size",
            )
        return width, height

    def check_together(self) -> None:
        """Raise ApiError if one parameter contradicts another."""
        if self.partial_images and not self.stream:
            raise ApiError(400, "partial_images needs stream: true.", param="partial_images")
        if self.output_compression is not None and self.format == "png":
            raise ApiError(
                400,
                "output_compression applies to jpeg and webp; png files are lossless. Set output_format to one of "
                "them, or leave out output_compression.",
                param="output_compression",
            )


def request_model(limits: Limits) -> type[ImageRequest]:
    """Return the class of requests within `limits`, whose schema states them."""
    text = Annotated[str, Field(max_length=limits.prompt)]
    bounded: dict[str, tuple[Any, Any]] = {
        "prompt": (Annotated[str, Field(min_length=1, max_length=limits.prompt)], ...),
        "negative_prompt": (text | None, None),
        "n": (Annotated[int, Field(ge=1, le=limits.images)] | None, None),
        "steps": (Annotated[int, Field(ge=1, le=limits.steps)] | None, None),
    }
    described = {
        name: (Annotated[kind, Field(description=ImageRequest.model_fields[name].description)], default)
        for name, (kind, default) in bounded.items()
    }
    definitions: Any = described
    return create_model("ImageRequest", __base__=ImageRequest, **definitions)


#: Hints for correcting a wrong value, by parameter.
_HINTS: Mapping[str, str] = {
    "response_format": "The server keeps no files that a URL could point to: images are in the response, as b64_json.",
    "quality": "Set the number of steps instead.",
    "background": "The model generates opaque images only.",
    "style": "Describe the style in the prompt.",
    "moderation": "The server does not moderate prompts or images: leave it out.",
    "size": 'Give the width and height in pixels, such as "512x512", or "auto".',
}


def invalid_request(errors: Sequence[Any]) -> ApiError:
    """Return the response to an invalid request, from pydantic's errors, without the values."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    # The parts after the name are the members of a union.
    param = where[0][:_LONGEST_NAME] if where and first["type"] != "json_invalid" else None
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if param is None:
        return ApiError(400, "The body must be a JSON object of parameters, sent with Content-Type: application/json.")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param!r}.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param!r}.", param=param, code="unknown_parameter")
    is_pattern = first["type"] == "string_pattern_mismatch"
    reason = "wrong format" if is_pattern else re.sub("^(Input|String|Value error,) ", "", first["msg"]).rstrip(".")
    hint = f" {_HINTS[param]}" if param in _HINTS else ""
    if first["type"] == "none_required":
        return ApiError(400, f"{param!r} is not supported.{hint}", param=param, code="invalid_value")
    return ApiError(400, f"Invalid {param!r}: {reason}.{hint}", param=param, code="invalid_value")


class ErrorDetail(BaseModel):
    """An error in OpenAI's format."""

    message: Annotated[str, Field(description="What is wrong, and what to do.")]
    type: Annotated[str, Field(description="The kind of error, such as `invalid_request_error`.")]
    param: Annotated[str | None, Field(description="The parameter that caused it, if it was one.")]
    code: Annotated[str | None, Field(description="A short name for programs, if there is one.")]


class ErrorResponse(BaseModel):
    """The body of a response with an error."""

    error: ErrorDetail


class ImageData(BaseModel):
    """An image."""

    b64_json: Annotated[str, Field(description="The file, in base64.")]
    seed: Annotated[int, Field(description="The seed. A request with this seed generates the image again.")]


class ImagesResponse(BaseModel):
    """The images of a request."""

    created: Annotated[int, Field(description="When the images were generated, in seconds since 1970 (UTC).")]
    data: Annotated[list[ImageData], Field(description="The images, in the order of their seeds.")]
    background: Annotated[Literal["opaque"], Field(description="Always `opaque`.")]
    output_format: Annotated[Literal["png", "jpeg", "webp"], Field(description="The file format of the images.")]
    size: Annotated[str, Field(description="The width and height in pixels, such as `512x512`.")]


class ModelDefaults(BaseModel):
    """The values of parameters that a request leaves out. Null stands for the pipeline's own value."""

    steps: Annotated[int | None, Field(description="The number of denoising steps.")] = None
    guidance: Annotated[float | None, Field(description="The guidance scale.")] = None
    size: Annotated[str | None, Field(description="The width and height in pixels.")] = None


class ModelCard(BaseModel):
    """The model that the server serves."""

    id: Annotated[str, Field(description="The name of the model.")]
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="When the server was started, in seconds since 1970 (UTC).")]
    owned_by: str = "tgate_compile"
    defaults: ModelDefaults
    limits: Annotated[dict[str, float], Field(description="The largest request that the server accepts.")]
    loras: Annotated[list[str], Field(description="The names of the LoRAs that a request may choose.")]


class ModelList(BaseModel):
    """A list with the server's only model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The health of the server."""

    status: Literal["ok", "not ready"]


class RunningRequest(BaseModel):
    """An image that is being generated."""

    request_id: Annotated[str, Field(description="The id of the request, with the number of the image.")]
    step: Annotated[int, Field(description="The number of the current step, from 0.")]
    steps: Annotated[int, Field(description="The number of steps; 0 before the first one.")]
    phase: Annotated[str, Field(description="The letter of the step's phase; empty before the first step.")]
    graph: Annotated[str, Field(description="The name of the graph that runs the step.")]


class Status(BaseModel):
    """The state of the engine, and totals since the start of the server."""

    ready: Annotated[bool, Field(description="Whether requests are accepted.")]
    waiting: Annotated[int, Field(description="The number of images that have not begun.")]
    running: Annotated[list[RunningRequest], Field(description="The images that are being generated.")]
    completed: Annotated[int, Field(description="The number of images that were completed.")]
    cancelled: Annotated[int, Field(description="The number of images that were cancelled.")]
    errors: Annotated[int, Field(description="The number of images that failed.")]
