"""Requests to an engine: tickets, progress, the errors that end requests, and the locks that their threads share.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tgate_compile._errors import ConfigurationError, TGateError, UnsupportedCallError

if TYPE_CHECKING:
    from tgate_compile.serve.worker import Submission, Work

#: What to do with a request whose size has not been captured.
NewSizes = Literal["capture", "background", "background-plain", "plain", "refuse"]
#: Those that capture it in a child process.
IN_BACKGROUND: frozenset[NewSizes] = frozenset({"background", "background-plain"})

MSG_CLOSED = "The engine is closed."
MSG_CRASHED = (
    "The engine's worker failed while the request {request} was in progress ({cause}). The worker has been "
    "restarted; send the request again."
)
MSG_TOO_LARGE = (
    "The caches of the request {request} take {needed:.1f} MB, but the engine's limit for all requests together is "
    "{limit:.1f} MB (memory=...). Request smaller or fewer images, or increase the limit."
)


class EngineBusyError(TGateError, RuntimeError):
    """Too many requests are waiting. The request was not accepted; send it again later."""


class EngineClosedError(TGateError, RuntimeError):
    """The engine is closed or closing. The request was not accepted, or has been ended."""


class EngineTimeoutError(TGateError, TimeoutError):
    """A request was not finished within its time limit. It has been ended."""


class EngineCrashedError(TGateError, RuntimeError):
    """The engine's worker failed while the request was in progress. The request may be sent again."""


@dataclass(frozen=True)
class EngineLimits:
    """The limits of an engine, as its arguments of these names describe them.

    Raises:
        ConfigurationError: one of them is wrong.
    """

    max_batch: int
    max_waiting: int
    max_running: int | None
    memory: int | None
    timeout: float | None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_running", "memory"):
            limit = getattr(self, name)
            if (name == "max_batch" or limit is not None) and (not _is_whole(limit) or limit < 1):
                raise ConfigurationError(f"{name} must be a positive whole number, but got {limit!r}.")
        if not _is_whole(self.max_waiting) or self.max_waiting < 0:
            raise ConfigurationError(f"max_waiting must be a whole number, at least 0, but got {self.max_waiting!r}.")
        check_timeout(self.timeout)

    @property
    def running(self) -> int:
        """The number of requests that may be in progress."""
        return 2 * self.max_batch if self.max_running is None else self.max_running


def check_timeout(timeout: object) -> None:
    """Raise ConfigurationError if `timeout` is neither None nor a positive number."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0):
        raise ConfigurationError(f"timeout must be a positive number of seconds, but got {timeout!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        step: the number of the current step, from 0.
        steps: the number of steps; 0 before the first denoiser call.
        phase: the letter of the step's phase; empty before the first denoiser call.
    """

    request_id: str
    step: int
    steps: int
    phase: str


@dataclass(frozen=True)
class EngineStats:
    """The current state of an engine, and totals since its start.

    Attributes:
        waiting: the number of requests that have not begun.
        running: the requests in progress.
        batches: for each graph, by the letter of its phase, the number of batches of each size in images.
        seconds: the time spent in each graph, by the letter of its phase.
        captures: the number of graphs that have been compiled, those of the warm-up included.
        cache_bytes: the memory reserved for the caches of the requests in progress, in bytes.
        errors: the number of requests that have failed, by the name of the exception's class.
        completed: the number of requests that have returned a result.
        cancelled: the number of requests that have been cancelled.
        components: for each text encoder and for the VAE, the number of batches of each size in rows.
        one_at_a_time: the reasons why requests run one at a time in some or all graphs; empty if all are batched.
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
    components: Mapping[str, Counter[int]] = field(default_factory=dict)
    one_at_a_time: Sequence[str] = ()


class Ticket:
    """The pending result of a request, like a `concurrent.futures.Future`."""

    def __init__(self, request_id: str, cancel: Callable[[], bool]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._future: Future[Any] = Future()

    def result(self, timeout: float | None = None) -> Any:
        """Return what the pipeline's call returned.

        Args:
            timeout: the number of seconds to wait; None sets no limit. The request continues after a timeout.

        Raises:
            TimeoutError: the request is not finished after `timeout` seconds.
            CancelledError: the request was cancelled.
            EngineTimeoutError: the request was not finished within its own time limit.
            EngineClosedError: the engine was closed before the request was finished.
            EngineCrashedError: the engine's worker failed while the request was in progress.
            Exception: the pipeline's call raised it.
        """
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception that `result` would raise because the request has failed; None if it succeeded."""
        return self._future.exception(timeout)

    def cancel(self) -> bool:
        """Cancel the request, which then ends before its next step. Returns False if it has already ended.

        Unlike a `Future`, a request can also be cancelled while it is in progress. `done` returns True only once the
        request has ended.
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

    def resolve(self, result: Any) -> None:
        """End the request with `result`. For the engine."""
        self._future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """End the request with `error`, or as cancelled if it is a `CancelledError`. For the engine."""
        if isinstance(error, CancelledError):
            self._future.cancel()
        else:
            self._future.set_exception(error)


class Ended(BaseException):
    """Raised in a request's thread to leave the pipeline's call after the request has been ended from outside.

    It derives from BaseException so that no `except Exception` in a pipeline stops it.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Gate:
    """Lets one thread wait until another one opens it, once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._is_open = False

    def open(self) -> None:
        """Let the thread continue."""
        if not self._is_open:
            self._is_open = True
            self._lock.release()

    def wait(self) -> None:
        """Wait until it is open. Called once."""
        self._lock.acquire()


class Request:
    """A request and its progress.

    Attributes:
        ticket: its ticket.
        call: the arguments of the pipeline's call.
        lora: the weights of its adapters; None for those that are active in the pipeline.
        on_step: called before each step is completed.
        deadline: the time by which it must be finished, on the clock of `time.monotonic`; None if there is none.
        end: the error with which it has to end early; None if there is none.
        step: the number of the current step.
        steps: the number of steps; 0 if it is not known yet.
        phase: the letter of the current step's phase.
        reserved: the memory reserved for its caches, in bytes.
        stepping: its last work item, if it is between two steps and about to make its next call; otherwise None.
        submission: the work item that its thread waits for.
        records: in a warm-up, its work items by the keys of their graphs; otherwise None.
    """

    def __init__(
        self,
        ticket: Ticket,
        call: Mapping[str, Any],
        lora: Mapping[str, float] | None,
        on_step: Callable[[Progress], None] | None,
        timeout: float | None,
    ) -> None:
        self.ticket = ticket
        self.call = call
        self.lora = lora
        self.on_step = on_step
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.end: Exception | None = None
        self.step = self.steps = self.reserved = 0
        self.phase = ""
        self.stepping: Work | None = None
        self.submission: Submission | None = None
        self.records: dict[Hashable, Work] | None = None

    @property
    def id(self) -> str:
        """Its id."""
        return self.ticket.request_id

    def check(self) -> None:
        """Raise `Ended` if the request has to end."""
        if self.end is None and self.is_late():
            self.end = self.too_late()
        if self.end is not None:
            raise Ended(self.end)

    def is_late(self) -> bool:
        """Return whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def too_late(self) -> EngineTimeoutError:
        """Return the error for a request whose deadline has passed."""
        done = f"step {self.step + 1} of {self.steps}" if self.steps else "waiting to begin"
        return EngineTimeoutError(
            f"The request {self.id} was not finished within {self.timeout:g} s ({done}). Increase the timeout, or send "
            "fewer requests at a time."
        )

    def report(self, latents: Callable[[], Any]) -> None:
        """Call `on_step` for the current step."""
        if self.on_step is not None:
            self.on_step(Progress(self.id, self.step, self.steps, self.phase, latents))


class CacheMemory:
    """The memory for the caches of all requests, which is reserved in the order in which requests ask for it.

    Args:
        limit: the number of bytes; None sets no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0
        self._waiting: deque[tuple[Request, int, Gate]] = deque()

    def ask(self, request: Request, nbytes: int) -> Gate | None:
        """Reserve memory, or return a gate that is opened when it has been reserved.

        Raises:
            UnsupportedCallError: it is more than the limit.
        """
        if self.limit is not None and nbytes > self.limit:
            raise UnsupportedCallError(
                MSG_TOO_LARGE.format(request=request.id, needed=nbytes / 1e6, limit=self.limit / 1e6)
            )
        # A request that already holds memory never waits for more, since two of them could wait for each other.
        if request.reserved or nbytes == 0 or (not self._waiting and self._fits(nbytes)):
            self._give(request, max(request.reserved, nbytes))
            return None
        gate = Gate()
        self._waiting.append((request, nbytes, gate))
        return gate

    def free(self, request: Request) -> None:
        """Free the memory of a request for those that wait."""
        self._give(request, 0)
        self._share()

    def withdraw(self, request: Request) -> None:
        """Stop a request from waiting for memory, because it has to end."""
        for waiting in [each for each in self._waiting if each[0] is request]:
            self._waiting.remove(waiting)
            waiting[2].open()
        self._share()

    def _share(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            request, nbytes, gate = self._waiting.popleft()
            self._give(request, nbytes)
            gate.open()

    def _fits(self, nbytes: int) -> bool:
        return self.limit is None or self.taken + nbytes <= self.limit

    def _give(self, request: Request, nbytes: int) -> None:
        self.taken += nbytes - request.reserved
        request.reserved = nbytes


class HostLock:
    """A lock that goes to the waiting thread with the lowest rank, and among equal ranks to the first in line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: list[tuple[int, int, int, Gate]] = []
        self._numbers = itertools.count()

    def acquire(self, rank: int = 0) -> None:
        """Acquire the lock; the thread that holds it may acquire it again."""
        me = threading.get_ident()
        with self._lock:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return
            gate = Gate()
            heapq.heappush(self._waiting, (rank, next(self._numbers), me, gate))
        gate.wait()  # `release` has made this thread the owner

    def release(self) -> None:
        """Release the lock, once for each time that it was acquired."""
        with self._lock:
            assert self._owner == threading.get_ident(), "released by a thread that does not have it"
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                *_, self._owner, gate = heapq.heappop(self._waiting)
                self._depth = 1
                gate.open()

    @contextmanager
    def held(self, rank: int = 0) -> Iterator[None]:
        """Hold the lock inside the context."""
        self.acquire(rank)
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def given_up(self, rank: int = 0) -> Iterator[None]:
        """Release the lock, which this thread must hold, inside the context, and acquire it again at the end."""
        with self._lock:
            depth, self._depth = self._depth, 1
        self.release()
        try:
            yield
        finally:
            self.acquire(rank)
            with self._lock:
                self._depth = depth
