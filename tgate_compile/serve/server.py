"""The HTTP server: OpenAI's images API over an engine, with health checks, metrics and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import logging
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tgate_compile import __version__
from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import GRAPH_NAMES
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.front import RECORD, Front, Record, unless_gone
from tgate_compile.serve.jobs import EventStream, Job, ServedModel, as_api_error
from tgate_compile.serve.observability import Metrics
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

logger = logging.getLogger(__name__)

#: Paths that need no API key, because they reveal nothing about requests.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})

#: The largest seed that the server chooses.
LARGEST_RANDOM_SEED = 2**31 - 1
#: The key, in a request's scope, of the seed that its first image gets if the request does not choose one.
SEED = "tgate_compile.seed"


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
        engine: generates the images.
        model: the model, or its name.
        api_key: the key that requests must send as `Authorization: Bearer KEY`; None lets anybody generate images.
        limits: the largest request that is accepted.
        drain: the seconds that requests in progress get to finish when the server shuts down and closes the engine;
            None leaves the engine open.

    Raises:
        ConfigurationError: the API key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("The API key is empty. Pass a key, or None to let anybody use the server.")
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
        description="Text-to-image generation with OpenAI's images API.",
        version=__version__,
        lifespan=lifespan,
        # These pages load scripts from other hosts.
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


#: The descriptions of error statuses, for the schema.
_MEANINGS = {
    400: "A parameter is wrong, or the model cannot generate the image.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many images are waiting. Try again after the time in the header `Retry-After`.",
    500: "The image could not be generated. The server's log has the reason.",
    503: "The server accepts no requests now, or the engine failed during this one. Send it again.",
    504: "The image was not finished within the server's time limit.",
}


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
        async def generate(request: Request, body: Any) -> Response:
            return await self.generate(request, body)

        # FastAPI takes the class of the body from the annotation; this one has the limits of this server.
        generate.__annotations__["body"] = request_model(self._limits)
        generate.__doc__ = self.generate.__doc__
        app.add_api_route(
            "/v1/images/generations",
            generate,
            methods=["POST"],
            summary="Generate images",
            operation_id="createImage",
            responses={
                200: {"model": ImagesResponse, "content": {"text/event-stream": {}}, "description": "The images."},
                **_errors(400, 404, 408, 413, 429, 500, 503, 504),
            },
            response_class=Json,
        )
        for path, endpoint, summary, answer, errors in (
            ("/v1/models", self.models, "Return the model", ModelList, ()),
            ("/status", self.status, "Return the state of the engine", Status, ()),
            ("/healthz", self.healthz, "Check whether the process responds", Health, ()),
            ("/readyz", self.readyz, "Check whether requests are accepted", Health, (503,)),
        ):
            responses = {200: {"model": answer}, **_errors(*errors, model=Health if path == "/readyz" else None)}
            app.add_api_route(path, endpoint, summary=summary, responses=responses, response_class=Json)
        app.add_api_route("/metrics", self.metrics, summary="Return metrics for Prometheus", response_class=_Text)
        app.add_api_route("/", self.page, include_in_schema=False, response_class=Response)

    async def generate(self, request: Request, body: ImageRequest) -> Response:
        """Generate images from a prompt. With `stream`, they and their previews are sent as server-sent events."""
        if body.model is not None and body.model != self._model.name:
            raise ApiError(
                404,
                f"The model {body.model[:100]!r} does not exist. This server serves {self._model.name!r}.",
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

    def _start(self, body: ImageRequest, record: Record, first: int) -> Job:
        sides = body.sides(self._limits)
        job = Job(self._engine, self._model, self._metrics, body, record, range(first, first + body.count))
        record.fields |= {"images": body.count, "seed": first, "stream": bool(body.stream)}
        try:
            calls = [self._model.call_for(body, sides, seed) for seed in job.seeds]
            job.submit(calls, (f"{record.request_id}-{next(self._numbers)}" for _ in calls))
        except Exception as error:
            job.cancel()
            raise as_api_error(error, self._metrics.typical_seconds) from error
        return job

    async def models(self) -> Response:
        """Return the model, with its defaults, its limits and the LoRAs that requests may choose."""
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
        """Return the images in progress, each with its step and phase, and totals."""
        stats = self._engine.stats()
        running = [
            {**vars(each), "graph": GRAPH_NAMES.get(each.phase.upper(), "") if each.phase else ""}
            for each in stats.running
        ]
        totals = {"completed": stats.completed, "cancelled": stats.cancelled, "errors": stats.errors.total()}
        return Json({"ready": self._engine.ready, "waiting": stats.waiting, "running": running, **totals})

    async def healthz(self) -> Response:
        """Return status 200 as long as the process responds."""
        return Json({"status": "ok"})

    async def readyz(self) -> Response:
        """Return status 200 if requests are accepted, and 503 otherwise."""
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
        404: "This path does not exist. /openapi.json lists the paths.",
        405: "This path does not support the method. /openapi.json lists the methods of each path.",
    }
    response = ApiError(error.status_code, messages.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response


def _errors(*statuses: int, model: Any = None) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model or ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


def _describe_errors(app: FastAPI, *, secured: bool) -> None:
    """Correct the schema: invalid requests get the status 400, and an API key may be needed."""
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
