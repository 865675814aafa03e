"""The HTTP server: OpenAI's images API over an engine, with health checks, metrics and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tgate_compile import __version__
from tgate_compile._errors import BundleError, ConfigurationError, UnsupportedModelError, first_line
from tgate_compile.methods.method import GRAPH_NAMES
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.front import RECORD, Front, Record, internal_error, unless_gone
from tgate_compile.serve.observability import Metrics
from tgate_compile.serve.requests import (
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineTimeoutError,
    Progress,
    Ticket,
)
from tgate_compile.serve.schemas import (
    ApiError,
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    Json,
    Limits,
    ModelCard,
    ModelDefaults,
    ModelList,
    Status,
    invalid_request,
    request_model,
)

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Seconds in which a stream that cannot begin is an ordinary error.
FIRST_PATIENCE = 1.0
#: Seconds after which a silent stream sends a comment, before proxies take the connection for dead.
KEEP_ALIVE = 15.0
#: Paths that need no API key, because they reveal nothing about requests.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})

#: Seeds that the server chooses are at most this.
LARGEST_RANDOM_SEED = 2**31 - 1
#: The key, in a request's scope, of the seed that its first image gets if the request does not choose one.
SEED = "tgate_compile.seed"
_LONGEST_RETRY = 30


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model that an engine serves, as clients see it.

    Attributes:
        name: its name in requests and answers.
        steps: denoising steps of a request that does not choose them; None: the pipeline's default.
        guidance: guidance scale, likewise.
        size: (width, height), likewise.
        call: further arguments of every call of the pipeline.
        loras: the names of the LoRA adapters that requests may choose.
        is_bundle: whether the engine serves a bundle, whose call takes a seed instead of a generator.
    """

    name: str
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    is_bundle: bool = False

    def call_for(self, request: ImageRequest, sides: tuple[int, int] | None, seed: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for one image."""
        width, height = sides or self.size or (None, None)
        chosen = {
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.steps or self.steps,
            "guidance_scale": self.guidance if request.guidance is None else request.guidance,
            "width": width,
            "height": height,
            "gate_step": request.gate_step,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return {**self.call, "prompt": request.prompt, **given, **self._seeded(seed)}

    def image_of(self, result: Any) -> Image:
        """Return the image in the result of a call."""
        image: Image = result if self.is_bundle else result.images[0]
        return image

    def _seeded(self, seed: int) -> dict[str, Any]:
        if self.is_bundle:
            return {"seed": seed}
        import torch  # bundles are served without it

        return {"generator": torch.Generator().manual_seed(seed)}  # on the CPU: the same noise on every device


def create_app(
    engine: Engine,
    *,
    model: ServedModel | str,
    api_key: str | None = None,
    limits: Limits | None = None,
    drain: float | None = 30.0,
) -> FastAPI:
    """Return the server's ASGI application, for uvicorn and the like.

    Args:
        engine: makes the images.
        model: the model, or its name.
        api_key: requests must send it as `Authorization: Bearer KEY`; None: anybody may make images.
        limits: the largest request that is accepted.
        drain: at shutdown the engine is closed, and requests get this many seconds to finish; None: it stays open.

    Raises:
        ConfigurationError: the API key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("The API key is empty. Give a key, or None for a server that is open to anybody.")
    limits = limits or Limits()
    metrics = Metrics(engine)
    served = _Server(engine, ServedModel(name=model) if isinstance(model, str) else model, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if drain is not None:
            logger.info("closing the engine, with up to %g seconds for the requests in it", drain)
            await asyncio.to_thread(engine.close, drain=True, timeout=drain)

    app = FastAPI(
        title="tgate-compile",
        description="Text-to-image generation by OpenAI's images API.",
        version=__version__,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = metrics
    app.add_middleware(Front, api_key=api_key, open_paths=OPEN_PATHS, limits=limits, metrics=metrics)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    served.add_routes(app)
    _describe_errors(app, secured=api_key is not None)
    return app


class _Server:
    """The endpoints."""

    def __init__(self, engine: Engine, model: ServedModel, limits: Limits, metrics: Metrics) -> None:
        self._engine = engine
        self._model = model
        self._limits = limits
        self._metrics = metrics
        self._created = int(time.time())
        self._numbers = itertools.count()
        self._page = resources.files("tgate_compile.serve").joinpath("page.html").read_bytes()

    def add_routes(self, app: FastAPI) -> None:
        # FastAPI reads the class of the body from the annotation; this one has the limits of this server.
        self_generate = self.generate

        async def generate(request: Request, body: Any) -> Response:
            return await self_generate(request, body)

        generate.__annotations__["body"] = request_model(self._limits)
        app.add_api_route(
            "/v1/images/generations",
            generate,
            methods=["POST"],
            summary="Make images",
            operation_id="createImage",
            responses={
                200: {"model": ImagesResponse, "content": {"text/event-stream": {}}, "description": "The images."},
                **_errors(400, 404, 408, 413, 429, 500, 503, 504),
            },
            response_class=Json,
        )
        for path, endpoint, summary, answer, errors in (
            ("/v1/models", self.models, "List the model", ModelList, ()),
            ("/status", self.status, "What the engine is doing", Status, ()),
            ("/healthz", self.healthz, "Whether the process lives", Health, ()),
            ("/readyz", self.readyz, "Whether requests are accepted", Health, (503,)),
        ):
            responses = {200: {"model": answer}, **_errors(*errors, model=Health if path == "/readyz" else None)}
            app.add_api_route(path, endpoint, summary=summary, responses=responses, response_class=Json)
        app.add_api_route("/metrics", self.metrics, summary="Metrics for Prometheus", response_class=_Text)
        app.add_api_route("/", self.page, include_in_schema=False, response_class=Response)

    async def generate(self, request: Request, body: ImageRequest) -> Response:
        """Make images of the prompt; with `stream`, send them and their previews as server-sent events."""
        if body.model is not None and body.model != self._model.name:
            raise ApiError(
                404,
                f"The model {body.model[:100]!r} does not exist. This server has {self._model.name!r}.",
                param="model",
                code="model_not_found",
            )
        body.check_together()
        seed = request.scope.get(SEED) if body.seed is None else body.seed
        job = self._start(body, request.scope[RECORD], random.randint(0, LARGEST_RANDOM_SEED) if seed is None else seed)
        if body.stream:
            return EventStream(job.events(), job.cancel)
        try:
            return Json(await unless_gone(request.receive, job.answer()))
        finally:
            job.cancel()

    def _start(self, body: ImageRequest, record: Record, first: int) -> _Job:
        sides = body.sides(self._limits)
        job = _Job(self._engine, self._model, self._metrics, body, record, range(first, first + body.count))
        record.fields |= {"images": body.count, "seed": first, "stream": bool(body.stream)}
        try:
            calls = [self._model.call_for(body, sides, seed) for seed in job.seeds]
            job.submit(calls, (f"{record.request_id}-{next(self._numbers)}" for _ in calls))
        except Exception as error:
            job.cancel()
            raise _as_api_error(error, self._metrics.typical_seconds) from error
        return job

    async def models(self) -> Response:
        """List the model, with its defaults, limits and LoRAs."""
        size = None if self._model.size is None else "{}x{}".format(*self._model.size)
        defaults = ModelDefaults(steps=self._model.steps, guidance=self._model.guidance, size=size)
        card = ModelCard(
            id=self._model.name,
            created=self._created,
            defaults=defaults,
            limits=vars(self._limits),
            loras=list(self._model.loras),
        )
        return Json(ModelList(data=[card]).model_dump())

    async def status(self) -> Response:
        """Return what the engine is doing: the images in progress, each with its step and phase."""
        stats = self._engine.stats()
        running = [
            {**vars(each), "graph": GRAPH_NAMES.get(each.phase.upper(), "") if each.phase else ""}
            for each in stats.running
        ]
        totals = {"completed": stats.completed, "cancelled": stats.cancelled, "errors": stats.errors.total()}
        return Json({"ready": self._engine.ready, "waiting": stats.waiting, "running": running, **totals})

    async def healthz(self) -> Response:
        """Return 200 as long as the process answers."""
        return Json({"status": "ok"})

    async def readyz(self) -> Response:
        """Return 200 if the engine accepts requests, otherwise 503."""
        return Json({"status": "ok"}) if self._engine.ready else Json({"status": "not ready"}, 503)

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def page(self) -> Response:
        """Return the built-in page."""
        return Response(self._page, headers=_page_headers(self._page), media_type="text/html")


class _Text(Response):
    media_type = "text/plain"


def _page_headers(page: bytes) -> dict[str, str]:
    """Return headers that let the page run its own script only, and load nothing from elsewhere."""
    script = re.search(rb"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class EventStream(Response):
    """Server-sent events, which end when the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Any) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._cancel()

    async def _send(self, send: Send) -> None:
        is_begun = False
        try:
            async for event in self._events:
                if not is_begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    is_begun = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            if not is_begun:
                raise  # the answer is then an ordinary error
            await send({"type": "http.response.body", "body": _event("error", error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Job:
    """The images of one HTTP request: a ticket of the engine for each, so that they are batched with all others."""

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        metrics: Metrics,
        body: ImageRequest,
        record: Record,
        seeds: Sequence[int],
    ) -> None:
        self.seeds = seeds
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._body = body
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        # (number of the image, latents of a preview or None for the end)
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    def submit(self, calls: Sequence[Mapping[str, Any]], ids: Any) -> None:
        """Hand the calls to the engine."""
        lora = self._body.adapters
        for index, (call, request_id) in enumerate(zip(calls, ids, strict=True)):
            on_step = self._previews(index) if self._body.partial_images else None
            self._tickets.append(self._engine.submit(call, lora=lora, on_step=on_step, request_id=request_id))
        for index, ticket in enumerate(self._tickets):
            ticket.add_done_callback(lambda _, index=index: self._put(index, None))

    def cancel(self) -> None:
        """Cancel the images that are not done."""
        for ticket in self._tickets:
            ticket.cancel()

    async def answer(self) -> dict[str, Any]:
        """Return the body of the answer, once all images are done."""
        for _ in self._tickets:
            index, _latents = await self._queue.get()
            self._image(index)  # raises the error of the first one that fails
        files = [await self._file(self._image(index)) for index in range(len(self._tickets))]
        data = [{"b64_json": file, "seed": seed} for file, seed in zip(files, self.seeds, strict=True)]
        return {"created": int(time.time()), "data": data, **self._facts(self._image(0))}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the previews and images, each as an event.

        Raises:
            ApiError: an image cannot be made.
        """
        left, previews = len(self._tickets), [0] * len(self._tickets)
        patience = FIRST_PATIENCE
        while left:
            try:
                index, latents = await asyncio.wait_for(self._queue.get(), patience)
            except TimeoutError:
                patience = KEEP_ALIVE
                yield b": keep-alive\n\n"
                continue
            if latents is None:
                left -= 1
                yield await self._event("completed", index, self._image(index), usage=_NO_USAGE)
            else:
                yield await self._event(
                    "partial_image", index, await self._preview(latents), partial_image_index=previews[index]
                )
                previews[index] += 1

    def _previews(self, index: int) -> Any:
        def on_step(progress: Progress) -> None:
            assert self._body.partial_images is not None
            if progress.step in preview_steps(progress.steps, self._body.partial_images):
                self._put(index, progress.latents())

        return on_step

    def _put(self, index: int, latents: Any) -> None:
        """Pass something on from a thread of the engine to the event loop."""
        if not self._loop.is_closed():  # the server has been stopped without waiting for its requests
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, latents))

    def _image(self, index: int) -> Image:
        try:
            return self._model.image_of(self._tickets[index].result(timeout=0))
        except Exception as error:
            raise _as_api_error(error, self._metrics.typical_seconds) from error

    async def _preview(self, latents: Any) -> Image:
        try:
            (image,) = await asyncio.to_thread(self._engine.decode, latents)
        except Exception as error:
            raise _as_api_error(error, self._metrics.typical_seconds) from error
        return image

    async def _file(self, image: Image) -> str:
        file = await asyncio.to_thread(_encoded, image, self._body.format, self._body.output_compression)
        self._count_first()
        self._metrics.sent_image(self._record.seconds)
        return file

    def _count_first(self) -> None:
        if "first_image_seconds" not in self._record.fields:
            self._record.fields["first_image_seconds"] = round(self._record.seconds, 4)
            self._metrics.first_image(self._record.seconds)

    def _facts(self, image: Image) -> dict[str, Any]:
        return {"background": "opaque", "output_format": self._body.format, "size": f"{image.width}x{image.height}"}

    async def _event(self, kind: str, index: int, image: Image, **more: Any) -> bytes:
        if kind == "completed":
            file = await self._file(image)
        else:
            file = await asyncio.to_thread(_encoded, image, self._body.format, self._body.output_compression)
            self._count_first()
        name = f"image_generation.{kind}"
        own = {"image_index": index, "seed": self.seeds[index]}
        facts = {"created_at": int(time.time()), "quality": "auto", **self._facts(image)}
        return _event(name, {"type": name, "b64_json": file, **facts, **own, **more})


#: The format of events requires it. This server counts no tokens.
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def preview_steps(steps: int, count: int) -> set[int]:
    """Return the steps before which previews are taken: `count`, evenly spread, or fewer if there are few steps."""
    return {round(steps * (number + 1) / (count + 1)) for number in range(count)} - {0, steps}


def _encoded(image: Image, file_format: str, compression: int | None) -> str:
    buffer = io.BytesIO()
    options = {} if file_format == "png" else {"quality": 100 if compression is None else compression}
    image.convert("RGB").save(buffer, format=file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


def _as_api_error(error: Exception, typical_seconds: float) -> ApiError:
    """Return the answer to a request that the engine has refused, or that has failed in it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        # By then about half of the requests in front are done.
        retry_after = min(max(1, math.ceil(typical_seconds / 2)), _LONGEST_RETRY)
        return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)
    if isinstance(error, (EngineClosedError, EngineCrashedError, CancelledError)):
        text = str(error) or "The request was cancelled. Send it again."
        return ApiError(503, text, kind="server_error", code="unavailable", retry_after=1)
    if isinstance(error, EngineTimeoutError):
        return ApiError(504, str(error), kind="server_error", code="timeout")
    if isinstance(error, (ConfigurationError, UnsupportedModelError, BundleError)):
        return ApiError(400, str(error), code="unsupported_request")
    if isinstance(error, ValueError):  # diffusers raises these for arguments that do not fit its pipelines
        logger.warning("the pipeline refused the request", exc_info=error)
        return ApiError(400, first_line(error), code="unsupported_request")
    logger.error("the request failed", exc_info=error)
    return internal_error()


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid_request(error.errors()).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        400: "The body is not valid JSON.",
        404: "There is nothing at this path. /openapi.json describes what there is.",
        405: "This path does not support the method. /openapi.json describes what there is.",
    }
    response = ApiError(error.status_code, messages.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response


def _errors(*statuses: int, model: Any = None) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model or ErrorResponse} for status in statuses}


def _describe_errors(app: FastAPI, *, secured: bool) -> None:
    """Correct the schema: errors of validation have the status 400, and an API key may be needed."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = make()
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if secured:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if secured and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = {
                        "description": "The API key is missing or wrong.",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
                    }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
