"""The images of one HTTP request: calls of the engine, and the response as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tgate_compile._errors import BundleError, ConfigurationError, UnsupportedModelError, first_line
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.front import Record, internal_error, unless_gone
from tgate_compile.serve.observability import Metrics
from tgate_compile.serve.requests import (
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineTimeoutError,
    Progress,
    Ticket,
)
from tgate_compile.serve.schemas import ApiError, ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Seconds after which a stream begins even without an event. An error before that is an ordinary response.
FIRST_PATIENCE = 1.0
#: Seconds after which a silent stream sends a comment, so that proxies do not close the connection.
KEEP_ALIVE = 15.0
_LONGEST_RETRY = 30


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model that an engine serves, as clients see it.

    Attributes:
        name: its name in requests and responses.
        steps: denoising steps of requests that do not set them; None means the pipeline's default.
        guidance: guidance scale of requests that do not set it; None means the pipeline's default.
        size: (width, height) of requests that do not set it; None means the pipeline's default.
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


class EventStream(Response):
    """Server-sent events, which end when the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None]) -> None:
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
                raise  # it is then an ordinary response
            await send({"type": "http.response.body", "body": _event("error", error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Job:
    """The images of one HTTP request, each with a ticket of the engine, so that they are batched with all others."""

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

    def submit(self, calls: Sequence[Mapping[str, Any]], ids: Iterator[str]) -> None:
        """Submit the calls to the engine."""
        lora = self._body.adapters
        for index, (call, request_id) in enumerate(zip(calls, ids, strict=True)):
            on_step = self._previews(index) if self._body.partial_images else None
            self._tickets.append(self._engine.submit(call, lora=lora, on_step=on_step, request_id=request_id))
        for index, ticket in enumerate(self._tickets):
            ticket.add_done_callback(self._ended(index))

    def cancel(self) -> None:
        """Cancel the images that are not finished."""
        for ticket in self._tickets:
            ticket.cancel()

    async def answer(self) -> dict[str, Any]:
        """Return the body of the response once all images are finished."""
        for _ in self._tickets:
            index, _latents = await self._queue.get()
            self._image(index)  # raises the error of the first one that fails
        files = [await self._file(self._image(index)) for index in range(len(self._tickets))]
        data = [{"b64_json": file, "seed": seed} for file, seed in zip(files, self.seeds, strict=True)]
        return {"created": int(time.time()), "data": data, **self._facts(self._image(0))}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the previews and images, each as an event.

        Raises:
            ApiError: an image cannot be generated.
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

    def _ended(self, index: int) -> Callable[[Ticket], None]:
        def on_end(_: Ticket) -> None:
            self._put(index, None)

        return on_end

    def _previews(self, index: int) -> Callable[[Progress], None]:
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
            raise as_api_error(error, self._metrics.typical_seconds) from error

    async def _preview(self, latents: Any) -> Image:
        try:
            images = await asyncio.to_thread(self._engine.decode, latents)
        except Exception as error:
            raise as_api_error(error, self._metrics.typical_seconds) from error
        image: Image = images[0]
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


def as_api_error(error: Exception, typical_seconds: float) -> ApiError:
    """Return the response to a request that the engine has refused, or that has failed there."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        # By then about half of the earlier requests are done.
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
