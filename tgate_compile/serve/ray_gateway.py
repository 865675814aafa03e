"""The gateway of a Ray Serve application: it forwards HTTP requests to replicas, and repeats those that are lost."""

from __future__ import annotations

import json
import logging.config
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import Counter as CounterMetric
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgate_compile._errors import ConfigurationError, first_line
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.front import RECORD, Record, unless_gone
from tgate_compile.serve.observability import Metrics, log_config
from tgate_compile.serve.requests import EngineStats
from tgate_compile.serve.schemas import ApiError, Limits
from tgate_compile.serve.server import LARGEST_RANDOM_SEED, create_app

logger = logging.getLogger(__name__)

#: The paths that any replica can answer; the gateway answers the others for all replicas together.
FORWARDED = ("/v1/images/generations", "/v1/models", "/openapi.json")
#: Seconds that a replica may take to report its state.
PATIENCE = 5.0

MSG_LOST = "Two replicas died one after the other while they processed the request. Send it again."
MSG_BUSY = "Too many requests are waiting. Send the request again later."
MSG_NONE = "No replicas are running. Send the request again later."

#: Errors of a call whose replica has died or cannot be reached.
LOST = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError)


def api_key_in(variable: str | None) -> str | None:
    """Return the API key in an environment variable; None if `variable` is None.

    Raises:
        ConfigurationError: the variable is empty or not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key.strip():
        raise ConfigurationError(
            f"The environment variable {variable} (api_key_variable) must contain the API key, but it is empty or not "
            "set here. Set it on every node before Ray is started, or in the application's runtime_env."
        )
    return key


@dataclass(frozen=True)
class State:
    """The state of a replica.

    Attributes:
        replica: its id.
        pid: the id of its process.
        ready: whether its engine accepts requests.
        stats: its engine's state and totals.
    """

    replica: str
    pid: int
    ready: bool
    stats: EngineStats


@dataclass(frozen=True)
class Forwarded:
    """An HTTP request on its way to a replica.

    Attributes:
        scope: its ASGI scope.
        body: its body.
        seed: the seed of the first image, if the body has none.
    """

    scope: dict[str, Any]
    body: bytes
    seed: int


class Fleet:
    """The engines of all replicas, with the interface of a single engine for its state."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._states: dict[str, State] = {}
        self._here: frozenset[str] = frozenset()

    async def refresh(self) -> None:
        """Ask all replicas for their states."""
        found: list[Any] = []
        try:
            asked = self._replicas.broadcast("state")
            found = await asked.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            logger.warning("the replicas do not report their state: %s", first_line(error, named=True))
        states = {state.replica: state for state in found if isinstance(state, State)}
        self._here = frozenset(states)
        self._states |= states  # states of replicas that are gone remain, because totals must not decrease

    @property
    def ready(self) -> bool:
        """Whether a replica accepts requests."""
        return any(self._states[name].ready for name in self._here)

    def stats(self) -> EngineStats:
        """Return the sum of the replicas' statistics, with the totals of those that are gone."""
        everyone = [state.stats for state in self._states.values()]
        here = [self._states[name].stats for name in sorted(self._here)]
        batches: dict[str, Counter[int]] = defaultdict(Counter)
        seconds: dict[str, float] = defaultdict(float)
        components: dict[str, Counter[int]] = defaultdict(Counter)
        errors: Counter[str] = Counter()
        for stats in everyone:
            errors += stats.errors
            for letter, sizes in stats.batches.items():
                batches[letter] += sizes
                seconds[letter] += stats.seconds.get(letter, 0.0)
            for name, sizes in stats.components.items():
                components[name] += sizes
        return EngineStats(
            waiting=sum(stats.waiting for stats in here),
            running=[running for stats in here for running in stats.running],
            batches=batches,
            seconds=seconds,
            captures=sum(stats.captures for stats in everyone),
            cache_bytes=sum(stats.cache_bytes for stats in here),
            errors=errors,
            completed=sum(stats.completed for stats in everyone),
            cancelled=sum(stats.cancelled for stats in everyone),
            components=components,
            one_at_a_time=tuple(dict.fromkeys(reason for stats in here for reason in stats.one_at_a_time)),
        )


class Gateway:
    """Accepts HTTP requests, forwards them to replicas, and sends those whose replica is lost to another one."""

    def __init__(self, replicas: Any, *, max_body: int, api_key_variable: str | None, adapters: Sequence[str]) -> None:
        logging.config.dictConfig(log_config())
        self._calls = replicas.options(method_name="answer", stream=True)
        self._adapters = frozenset(adapters)
        self._fleet = Fleet(replicas)
        self._app = create_app(
            cast(Engine, self._fleet),  # only its state is asked for
            model="",  # requests that concern the model are forwarded
            api_key=api_key_in(api_key_variable),
            limits=Limits(body=max_body),
            drain=None,
        )
        self._app.router.routes[:0] = [Route(path, _AsgiApp(self._forward)) for path in FORWARDED]
        self._metrics: Metrics = self._app.state.metrics
        self._retries = CounterMetric(
            "tgate_retries", "Requests that were sent to another replica.", registry=self._metrics.registry
        )

    async def __call__(self, request: Request) -> Response:
        """Return the response to an HTTP request, which is produced while it is sent."""
        return _AsgiApp(self._run)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in ("/metrics", "/readyz", "/status"):
            await self._fleet.refresh()
        echoed = dict(scope["headers"]).get(b"x-request-id")

        async def send_with_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # Serve's proxy adds this id itself
                message["headers"] = [pair for pair in message["headers"] if pair != (b"x-request-id", echoed)]
            await send(message)

        await self._app(_forwarded_scope(scope, path), receive, send_with_one_id)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a replica answer, unless the client closes the connection."""
        path, record = scope["path"], scope[RECORD]
        scope["route"] = SimpleNamespace(path=path)  # for the metrics
        body = await Request(scope, receive).body()
        headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        forwarded = Forwarded(
            scope={
                **_forwarded_scope(scope, path),
                "headers": [*headers, (b"x-request-id", record.request_id.encode())],
            },
            body=body,
            seed=random.randint(0, LARGEST_RANDOM_SEED),
        )
        calls = self._calls.options(multiplexed_model_id=self._adapters_of(body)) if self._adapters else self._calls
        await unless_gone(receive, self._answer(calls, forwarded, _Answer(send, record, self._metrics)))

    async def _answer(self, calls: Any, forwarded: Forwarded, answer: _Answer) -> None:
        """Forward the response of a replica, or of another one if the first is lost."""
        try:
            await self._attempt(calls, forwarded, answer, is_last=False)
        except _LostError as error:
            logger.warning("a replica was lost (%s); the request is sent to another one", error)
            self._retries.inc()
            answer.record.fields["retried"] = True
            await self._attempt(calls, forwarded, answer, is_last=True)

    async def _attempt(self, calls: Any, forwarded: Forwarded, answer: _Answer, *, is_last: bool) -> None:
        response = calls.remote(forwarded)
        is_done = False
        try:
            async for message in response:
                if not is_last and answer.is_unavailable(message):
                    raise _LostError("its engine ended the request")
                await answer.pass_on(message)
            is_done = True
        except LOST as error:
            is_done = True
            if not is_last:
                raise _LostError(type(error).__name__) from error
            await answer.fail(ApiError(503, MSG_LOST, kind="server_error", code="unavailable", retry_after=1))
        except BackPressureError:
            is_done = True
            wait = min(max(1, math.ceil(self._metrics.typical_seconds / 2)), 30)
            busy = ApiError(429, MSG_BUSY, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=wait)
            await answer.fail(busy)
        except DeploymentUnavailableError:
            is_done = True
            await answer.fail(ApiError(503, MSG_NONE, kind="server_error", code="unavailable", retry_after=10))
        finally:
            if not is_done:
                response.cancel()

    def _adapters_of(self, body: bytes) -> str:
        """Return the LoRAs of a request and their weights as JSON; empty if it has none, or is not valid."""
        try:
            lora = json.loads(body).get("lora")
        except (ValueError, AttributeError, RecursionError):
            return ""
        weights = {lora: 1.0} if isinstance(lora, str) else lora
        if not isinstance(weights, dict) or not weights or not self._adapters.issuperset(weights):
            return ""
        if not all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights.values()):
            return ""
        return json.dumps({name: float(weights[name]) for name in sorted(weights)})


class _LostError(Exception):
    """The replica that was processing a request is lost, or has ended the request."""


class _Answer:
    """The response to a client, whose parts may come from two replicas."""

    def __init__(self, send: Send, record: Record, metrics: Metrics) -> None:
        self.record = record
        self._send = send
        self._metrics = metrics
        self._start: Message = {}
        self._is_begun = False
        self._sent: set[tuple[object, ...]] = set()

    def is_unavailable(self, message: Message) -> bool:
        """Return whether a message of a replica means that the request may be sent to another one."""
        body: bytes = message.get("body", b"")
        is_error = self._start.get("status") == 503 or body.startswith(b"event: error\n")
        return is_error and b'"code":"unavailable"' in body

    async def pass_on(self, message: Message) -> None:
        """Send a message of a replica, unless the client has received the same from another one."""
        if message["type"] == "http.response.start":
            self._start = message  # sent with the first part of the body, because this replica may still fail
            return
        body: bytes = message.get("body", b"")
        if self._is_begun and self._start["status"] != 200 and body:
            body = b"event: error\ndata: " + body + b"\n\n"  # the second replica refuses to continue a stream
        kind = _kind_of_event(body)
        if kind:
            if kind in self._sent:
                return
            self._sent.add(kind)
        await self._begin()
        self._note(body)
        await self._send({**message, "body": body})

    async def fail(self, error: ApiError) -> None:
        """End the response with an error."""
        if not self._is_begun:
            raise error
        body = json.dumps(error.body(), separators=(",", ":")).encode()
        await self._send({"type": "http.response.body", "body": b"event: error\ndata: " + body + b"\n\n"})

    async def _begin(self) -> None:
        if not self._is_begun:
            self._is_begun = True
            await self._send(self._start)

    def _note(self, body: bytes) -> None:
        """Record the images in a part of the response, for the log and the metrics."""
        if b'"b64_json":"' not in body or self._start["status"] != 200:
            return
        if "first_image_seconds" not in self.record.fields:
            self.record.fields["first_image_seconds"] = round(self.record.seconds, 4)
            self._metrics.first_image(self.record.seconds)
        if not body.startswith(b"event: image_generation.partial_image\n"):
            for _ in range(body.count(b'"b64_json":"')):
                self._metrics.sent_image(self.record.seconds)


def _kind_of_event(body: bytes) -> tuple[object, ...]:
    """Return the identity of a server-sent event within its stream; empty if `body` is not such an event."""
    name, _, data = body.partition(b"\ndata: ")
    if not name.startswith(b"event: image_generation."):
        return ()
    fields = json.loads(data)
    return name, fields["image_index"], fields.get("partial_image_index")


def _forwarded_scope(scope: Scope, path: str) -> dict[str, Any]:
    """Return the parts of a scope that another application needs."""
    kept = ("type", "http_version", "method", "scheme", "query_string", "headers", "client", "server")
    return {**{name: scope[name] for name in kept if name in scope}, "path": path, "root_path": ""}


class _AsgiApp(Response):
    """An ASGI application that is a response for Serve and an endpoint for Starlette."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run it."""
        await self._app(scope, receive, send)
