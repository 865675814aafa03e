"""Middleware for every HTTP request: its id, the API key, the limit on the body, errors, metrics and the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgate_compile.serve.observability import REQUEST_ID, Metrics
from tgate_compile.serve.schemas import ApiError, Limits

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: The status in log and metrics if the client closes its connection before the response, as in nginx. It is never sent.
CLIENT_GONE = 499

#: The key of a request's record in its scope.
RECORD = "tgate_compile.record"
#: Ids from clients go into logs and headers, so they are short and plain.
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ClientGoneError(Exception):
    """The client closed its connection, so no response can be sent."""


@dataclass
class Record:
    """The log's record of a request.

    Attributes:
        request_id: the client's `X-Request-Id`, or a new one.
        began: when the request arrived, on the clock of `time.perf_counter`.
        status: the HTTP status; None before the response.
        fields: further fields of the log line.
    """

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    status: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The time since the request arrived."""
        return time.perf_counter() - self.began


class Front:
    """ASGI middleware around the endpoints.

    It refuses requests without the API key, or with a body that is too large, before they are parsed.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, open_paths: frozenset[str], limits: Limits, metrics: Metrics
    ) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._open_paths = open_paths
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = scope[RECORD] = Record(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        token = REQUEST_ID.set(record.request_id)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._serve(scope, headers, receive, answer)
        except ClientGoneError:
            record.status = CLIENT_GONE
        except Exception as error:
            if record.status is not None:
                raise  # the server closes the connection, so that the client notices that the response is incomplete
            await self._failed(error)(scope, receive, answer)
        finally:
            self._note(scope, record)
            REQUEST_ID.reset(token)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if self._api_key is not None and scope["path"] not in self._open_paths:
            self._check_key(headers.get("authorization", ""))
        if scope["method"] in ("POST", "PUT", "PATCH"):
            receive = _replayed(await read_body(receive, headers, self._limits), receive)
        await self._app(scope, receive, send)

    def _check_key(self, authorization: str) -> None:
        assert self._api_key is not None
        scheme, _, given = authorization.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._api_key)  # takes the same time for every wrong key
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as the header `Authorization: Bearer KEY`.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _failed(self, error: Exception) -> ASGIApp:
        if isinstance(error, ApiError):
            return error.response()
        logger.error("the request failed", exc_info=error)
        return internal_error().response()

    def _note(self, scope: Scope, record: Record) -> None:
        path = getattr(scope.get("route"), "path", "other")
        status = record.status or CLIENT_GONE
        seconds = record.seconds
        self._metrics.answered(path, status, seconds)
        fields = {"method": scope["method"], "path": scope["path"][:200], "status": status}
        fields |= {"seconds": round(seconds, 4), **record.fields}
        level = logging.DEBUG if path in ("/healthz", "/readyz", "/metrics", "/status") else logging.INFO
        logger.log(level, "request", extra={"fields": fields})


def internal_error() -> ApiError:
    """Return the response to a request that failed for a reason that clients must not see."""
    return ApiError(
        500,
        f"The request failed on the server. The server's log has the reason under the request id {REQUEST_ID.get()}.",
        kind="server_error",
        code="internal_error",
    )


async def read_body(receive: Receive, headers: Headers, limits: Limits) -> bytes:
    """Return the body of a request. It is not read beyond the limit.

    Raises:
        ApiError: the body is too large, or takes too long.
        ClientGoneError: the client closed the connection.
    """
    too_large = ApiError(
        413, f"The body of the request is too large; at most {limits.body} bytes are accepted.", code="body_too_large"
    )
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > limits.body:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {limits.body_seconds:g} seconds.", code="body_timeout"
        ) from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that delivers `body` first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, and cancel it if the client closes the connection. The body must have been read.

    Raises:
        ClientGoneError: the client closed the connection.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
            # Its result has been used, or is not needed.
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
