"""Requests to an engine: their tickets, their progress, the errors that end them, and the lock that they take turns by.

Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tgate_compile._errors import TGateError


class EngineBusyError(TGateError, RuntimeError):
    """Too many requests are waiting. The request was not accepted; send it again later."""


class EngineClosedError(TGateError, RuntimeError):
    """The engine is closed or closing. The request was not accepted, or has been ended."""


class EngineTimeoutError(TGateError, TimeoutError):
    """A request was not done within its time. It has been ended."""


class EngineCrashedError(TGateError, RuntimeError):
    """The engine's worker failed while the request was in progress. The request may be sent again."""


@dataclass(frozen=True)
class Progress:
    """A step that a request is about to complete.

    Attributes:
        request_id: the id of the request.
        step: the number of the step, from 0.
        steps: the number of steps of the generation.
        phase: the letter of the step's phase, as in a strip (`docs/reference/schedules.md`).
        latents: returns a copy of the latents before the step, as the pipeline holds them. It may be called only
            inside `on_step`; `Engine.decode` turns the result into images at any time.
    """

    request_id: str
    step: int
    steps: int
    phase: str
    latents: Callable[[], Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Running:
    """A request in progress.

    Attributes:
        request_id: the id of the request.
        step: the number of the present step, from 0.
        steps: the number of steps; 0 before the first denoiser call.
        phase: the letter of the present step's phase; empty before the first denoiser call.
    """

    request_id: str
    step: int
    steps: int
    phase: str


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine, and totals since its start.

    Attributes:
        waiting: the number of requests that have not begun.
        running: the requests in progress.
        batches: for each graph, by the letter of its phase: how many batches it has run, by the number of images.
        seconds: the time spent in each graph, by the letter of its phase.
        captures: the number of graphs that have been compiled, those of the warm-up included.
        cache_bytes: the memory reserved for the caches of the requests in progress, in bytes.
        errors: the number of requests that have failed, by the name of the exception's class.
        completed: the number of requests that have returned a result.
        cancelled: the number of requests that have been cancelled.
    """

    waiting: int
    running: Sequence[Running]
    batches: Mapping[str, Counter[int]]
    seconds: Mapping[str, float]
    captures: int
    cache_bytes: int
    errors: Counter[str]
    completed: int
    cancelled: int


class Ticket:
    """The result of a request that is not there yet, like a `concurrent.futures.Future`."""

    def __init__(self, request_id: str, cancel: Callable[[], bool]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._future: Future[Any] = Future()

    def result(self, timeout: float | None = None) -> Any:
        """Return what the pipeline's call returned.

        Args:
            timeout: the number of seconds to wait; None waits as long as it takes. The request goes on afterwards.

        Raises:
            TimeoutError: the request is not done after `timeout`.
            CancelledError: the request was cancelled.
            EngineTimeoutError: the request was not done within its own time.
            EngineClosedError: the engine was closed before the request was done.
            EngineCrashedError: the engine's worker failed while the request was in progress.
            Exception: what the pipeline's call raised.
        """
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what `result` would raise because the request has failed; None if it was successful."""
        return self._future.exception(timeout)

    def cancel(self) -> bool:
        """Cancel the request, which then ends before its next step. Returns False if it is already done.

        Unlike with a `Future`, a request in progress can be cancelled as well. It is done only once it has ended.
        """
        return not self._future.done() and self._cancel()

    def cancelled(self) -> bool:
        """Return whether the request was cancelled and has ended."""
        return self._future.cancelled()

    def done(self) -> bool:
        """Return whether the request has ended: with a result, with an error, or because it was cancelled."""
        return self._future.done()

    def add_done_callback(self, function: Callable[[Ticket], object]) -> None:
        """Call `function` with this ticket once the request has ended, or now if it has.

        It is called in a thread of the engine and must return quickly. Exceptions that it raises are logged.
        """
        self._future.add_done_callback(lambda future: function(self))
