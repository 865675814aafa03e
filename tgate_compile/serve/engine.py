"""The engine: it accepts requests, runs them side by side, and batches their denoiser calls.

Each request runs the pipeline's own call in a separate thread. One of these threads at a time runs the pipeline's code,
since tokenizers, text encoders and decoders are not thread-safe. At a denoiser call the thread hands over the
call's inputs and waits for the results. A single worker collects the waiting calls, groups those that one graph can
serve together, and runs the graph once for all of them.

This module does not handle tensors. A `Served` model decides which calls can be grouped, and runs the groups.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import first_line
from tgate_compile.engine.traffic import paused, running
from tgate_compile.serve.requests import (
    MSG_CLOSED,
    MSG_CRASHED,
    CacheMemory,
    Ended,
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineLimits,
    EngineStats,
    HostLock,
    NewSizes,
    Progress,
    Request,
    Running,
    Ticket,
    check_timeout,
)
from tgate_compile.serve.worker import Job, Served, Submission, Work, Worker

if TYPE_CHECKING:
    from tgate_compile.serve.background import Task

logger = logging.getLogger(__name__)

#: The seconds after which a request that waits for a capture looks whether it has to end.
A_MOMENT = 0.1
#: The seconds after which the worker looks around when nothing has happened.
A_WHILE = 60.0
#: Seconds that `close` waits for requests to end after it has interrupted them.
PATIENCE = 60.0

# Ranks of threads that wait to run the pipeline's code.
_STEPPING, _LEAVING, _BEGINNING = range(3)


class Engine:
    """Serves many requests at a time with one pipeline.

    Use it as a context manager, or call `close`. The end of the context ends requests that are still in progress. While
    the engine is open, the pipeline itself cannot be called.

    Args:
        pipe: an optimized pipeline (`tgate_compile.optimize`).
        warm_up: arguments of the pipeline's call, one mapping for each kind of request to expect. For each of them,
            the graphs that the call needs are compiled, run and checked for all batch sizes before the engine is
            ready, so that no such request waits for a compilation later. The calls are executed, so give them few
            steps, but let them reach all phases: `{"prompt": "a fox", "num_inference_steps": 4, "gate_step": 2}`. An
            entry `lora` has the meaning of that argument of `submit`.
        max_batch: the largest number of images in a batch. Batches have 1, 2, 4, ... images, up to this number.
        max_waiting: the number of requests that may wait to begin; `submit` raises `EngineBusyError` beyond it.
        max_running: the number of requests that may be in progress; the default is twice `max_batch`.
        memory: the number of bytes that the caches of all requests in progress may take; None sets no limit.
        timeout: the number of seconds that a request may take, waiting included; None sets no limit.
        new_sizes: what to do with a request whose size (or number of images, or guidance) has not been captured:
            `"capture"` captures it at once, while all requests wait; `"background"` captures it in a child process,
            while only requests of this size wait; `"background-plain"` does the same, but runs requests of this size
            with the plain pipeline until the graphs are ready; `"plain"` always runs them with the plain pipeline;
            `"refuse"` lets them fail with an `UnsupportedCallError`. Child processes need Linux, a model on the CPU,
            and the disk cache.

    Raises:
        ConfigurationError: an argument is wrong, or the pipeline is not optimized, or cannot be served.
        ConcurrentGenerationError: the pipeline is in the middle of a call, or is served by another engine.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        warm_up: Iterable[Mapping[str, Any]] = (),
        max_batch: int = 8,
        max_waiting: int = 64,
        max_running: int | None = None,
        memory: int | None = None,
        timeout: float | None = None,
        new_sizes: NewSizes = "capture",
    ) -> None:
        from tgate_compile.serve.pipelines import ServedPipeline  # imports PyTorch, which bundles do without

        self._limits = EngineLimits(max_batch, max_waiting, max_running, memory, timeout)
        self._start(ServedPipeline(pipe, max_batch=max_batch, new_sizes=new_sizes), list(warm_up))

    @classmethod
    def from_bundle(
        cls,
        folder: str | os.PathLike[str],
        *,
        warm_up: Iterable[Mapping[str, Any]] = (),
        max_batch: int = 8,
        max_waiting: int = 64,
        max_running: int | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Engine:
        """Return an engine for the bundle in `folder`, which needs no PyTorch (`tgate_compile.runtime`).

        `submit` then takes the arguments of `BundlePipeline.__call__`, without `callback`, and results are what that
        call returns.

        Args:
            folder: the folder of a bundle that was exported with `components="all"`.
            warm_up: as for `Engine`; the calls are made one after the other, which opens the bundle's graphs.
            max_batch: as for `Engine`.
            max_waiting: as for `Engine`.
            max_running: as for `Engine`.
            timeout: as for `Engine`.
            options: options of `BundlePipeline`.

        Raises:
            BundleError: the bundle is damaged or unsuitable.
            ConfigurationError: an argument is wrong.
        """
        from tgate_compile.serve.bundles import ServedBundle

        engine = cls.__new__(cls)
        engine._limits = EngineLimits(max_batch, max_waiting, max_running, None, timeout)
        engine._start(ServedBundle(folder, **options), list(warm_up))
        return engine

    def _start(self, served: Served, warm_up: Sequence[Mapping[str, Any]]) -> None:
        self._served = served
        self._memory = CacheMemory(self._limits.memory)
        self._host = HostLock()
        self._lock = threading.Lock()
        self._for_threads = threading.Condition(self._lock)
        self._for_close = threading.Condition(self._lock)
        self._queue: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by the id of the object, in the order in which they began
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closing = self._stopped = self._released = False
        self._numbers = itertools.count()
        self._errors: Counter[str] = Counter()
        self._completed = self._cancelled = 0
        self._warm = False
        self._worker = Worker(
            served,
            self._lock,
            max_batch=self._limits.max_batch,
            stepping=lambda: [each.stepping for each in self._running.values() if each.stepping is not None],
            watch=self._end_late,
            lose=self._lose,
        )
        atexit.register(self.close, False)
        try:
            self.prepare(warm_up)
        except BaseException:
            self.close(drain=False)
            raise
        with self._lock:
            self._worker.forget()
            self._warm = True

    # Requests.

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests: it is warmed up, not closing, and its worker runs."""
        return self._warm and self._worker.alive and not self._closing

    def prepare(self, calls: Iterable[Mapping[str, Any]]) -> None:
        """Compile, run and check the graphs that calls like `calls` need, for all batch sizes.

        No such request waits for a compilation later. The argument `warm_up` does the same before the engine is ready.
        Other requests continue, but captures pause them unless they are made in the background (`new_sizes`).

        Args:
            calls: arguments of the pipeline's call, as for `warm_up`.

        Raises:
            ConfigurationError: a call has arguments that the pipeline does not know, or an adapter is not loaded.
            EngineClosedError: the engine is closed or closing.
        """
        self._served.warm_up(self, list(calls))

    def submit(
        self,
        call: Mapping[str, Any],
        *,
        lora: Mapping[str, float] | None = None,
        timeout: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Accept a request, and return a ticket for its result.

        Args:
            call: the arguments of the pipeline's call. Generators, if any, must not be shared between requests.
            lora: the weights of loaded LoRA adapters by name; None leaves those that were active when the engine
                started, and an empty mapping uses none.
            timeout: the number of seconds that this request may take; None means the engine's own.
            on_step: called in the request's thread before each step is completed. The request fails if it raises. It
                must return quickly, because other requests wait for it.
            request_id: an id for statistics and logs; the default is a number.

        Raises:
            EngineBusyError: too many requests are waiting.
            EngineClosedError: the engine is closed or closing.
            ConfigurationError: the call has arguments that the pipeline does not know, or an adapter is not loaded.
        """
        check_timeout(timeout)
        self._served.check(call, lora)
        return self.accept(call, lora, self._limits.timeout if timeout is None else timeout, on_step, request_id).ticket

    def accept(
        self,
        call: Mapping[str, Any],
        lora: Mapping[str, float] | None,
        timeout: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        request_id: str | None = None,
        records: dict[Hashable, Work] | None = None,
    ) -> Request:
        """Accept a request. `records` collects its work items, for a warm-up."""
        number = next(self._numbers)
        ticket = Ticket(str(number) if request_id is None else request_id, lambda: self._cancel(request))
        request = Request(ticket, dict(call), None if lora is None else dict(lora), on_step, timeout)
        request.records = records
        with self._lock:
            if self._closing:
                raise EngineClosedError(MSG_CLOSED)
            free = self._limits.running - len(self._running)
            if records is None and len(self._queue) >= self._limits.max_waiting + free:
                raise EngineBusyError(
                    f"{len(self._queue)} requests are waiting (max_waiting={self._limits.max_waiting}). Send the "
                    "request again later."
                )
            self._queue.append(request)
            if len(self._queue) > self._idle and len(self._threads) < self._limits.running:
                self._start_thread()
            self._for_threads.notify()
            if request.deadline is not None:
                self._worker.wake()  # it watches the time
        return request

    def _cancel(self, request: Request) -> bool:
        return self._end(request, CancelledError(f"The request {request.id} was cancelled."))

    def _end(self, request: Request, reason: Exception) -> bool:
        """End a request before its next step; return False if it has already ended."""
        with self._lock:
            if request in self._queue:
                self._queue.remove(request)
                self._count(reason)
            elif id(request) not in self._running:
                return False
            else:
                self._interrupt(request, reason)
                return True
        request.ticket.fail(reason)
        return True

    def _interrupt(self, request: Request, reason: Exception) -> None:
        """End a running request, at once if its thread is waiting. The lock must be held."""
        request.end = request.end or reason
        self._worker.withdraw(request, request.end)
        self._memory.withdraw(request)

    def _count(self, error: BaseException | None) -> None:
        if error is None:
            self._completed += 1
        elif isinstance(error, CancelledError):
            self._cancelled += 1
        else:
            self._errors[type(error).__name__] += 1

    # Threads of requests.

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._attend, name=f"tgate-request-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _attend(self) -> None:
        """Run waiting requests, one after the other, until the engine stops."""
        while True:
            with self._lock:
                self._idle += 1
                while not self._queue and not self._stopped:
                    self._for_threads.wait()
                self._idle -= 1
                if not self._queue:
                    return
                request = self._queue.popleft()
                self._running[id(request)] = request
            self._handle(request)

    def _handle(self, request: Request) -> None:
        """Run a request in this thread, and end its ticket."""
        error: BaseException | None = None
        result: Any = None
        try:
            with self._host.held(_BEGINNING):
                request.check()
                result = self._served.run(request, self)
        except Ended as ended:
            error = ended.reason
        except BaseException as raised:  # the ticket passes every error on to its owner
            error = raised
        with self._lock:
            del self._running[id(request)]
            request.stepping = None
            request.submission = None
            self._memory.free(request)
            if request.records is None:
                self._count(error)
            self._worker.wake()
            self._for_close.notify_all()
        if error is None:
            request.ticket.resolve(result)
        else:
            request.ticket.fail(error)

    # Called by a served model, in a request's thread.

    def compute(self, work: Work, request: Request | None = None) -> Any:
        """Let the worker run `work`, and return its result. A request's thread releases the host lock while it waits.

        Raises:
            Ended: the request has to end.
            Exception: `work` has failed with it.
        """
        if request is not None:
            request.check()
        submission = Submission(work, request)
        with self._lock:
            if self._stopped:
                raise EngineClosedError(MSG_CLOSED)
            if request is not None:
                request.stepping = None
                request.submission = submission
            self._worker.put(submission)
        if request is None:
            submission.gate.wait()
        else:
            with self._aside(_LEAVING if work.is_last else _STEPPING):
                submission.gate.wait()
            request.check()
        if submission.error is not None:
            raise submission.error
        return submission.result

    def reserve(self, request: Request, nbytes: int) -> None:
        """Wait until the caches of `request`, of this size, fit into the memory, and reserve it.

        Raises:
            Ended: the request has to end.
            UnsupportedCallError: the caches are larger than the limit.
        """
        with self._lock:
            gate = self._memory.ask(request, nbytes)
        if gate is not None:
            with self._aside(_STEPPING):
                gate.wait()
            request.check()

    def wait(self, request: Request, tasks: Iterable[Task]) -> None:
        """Return once `tasks` are done. A request's thread releases the host lock while it waits.

        Raises:
            Ended: the request has to end.
        """
        with self._aside(_STEPPING):
            for task in tasks:
                while request.end is None and not task.wait(A_MOMENT):
                    pass
        request.check()

    @contextmanager
    def _aside(self, rank: int) -> Iterator[None]:
        """Inside the context, let other threads run the pipeline's code, and let captures begin."""
        with paused(), self._host.given_up(rank):
            yield

    # Called by the worker, with the lock held.

    def _end_late(self) -> float | None:
        """End requests that have timed out, and return when to check again; None if there is no request."""
        for request in [each for each in self._queue if each.is_late()]:
            self._queue.remove(request)
            error = request.too_late()
            self._count(error)
            # Not under the lock, since it calls the functions of `add_done_callback`.
            self._worker.put(Submission(Job(functools.partial(request.ticket.fail, error)), None))
        for request in self._running.values():
            if request.end is None and request.is_late():
                self._interrupt(request, request.too_late())
        deadlines = [
            request.deadline
            for request in (*self._queue, *self._running.values())
            if request.end is None and request.deadline is not None
        ]
        if deadlines:
            return min(deadlines)
        return time.monotonic() + A_WHILE if self._queue or self._running else None

    def _lose(self, lost: Sequence[Submission], error: BaseException) -> None:
        """End the requests whose work was lost when the worker failed, and those between two steps."""

        def crashed(request: str) -> EngineCrashedError:
            return EngineCrashedError(MSG_CRASHED.format(request=request, cause=first_line(error, named=True)))

        for request in self._running.values():
            if request.stepping is not None or request.submission in lost:
                request.end = crashed(request.id)
        for submission in lost:
            submission.error = crashed("(none)" if submission.request is None else submission.request.id)

    # The rest.

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`, as `Progress.latents` returns them. May be called from any thread.

        Raises:
            UnsupportedCallError: the pipeline's latents cannot be decoded on their own.
        """
        with self._host.held(_LEAVING), running():
            return self._served.decode(latents)

    def stats(self) -> EngineStats:
        """Return the current state, and totals since the start."""
        with self._lock:
            return EngineStats(
                waiting=len(self._queue),
                running=[Running(each.id, each.step, each.steps, each.phase) for each in self._running.values()],
                batches={letter: Counter(sizes) for letter, sizes in self._worker.batches.items()},
                seconds=dict(self._worker.seconds),
                captures=self._served.captures,
                cache_bytes=self._memory.taken,
                errors=Counter(self._errors),
                completed=self._completed,
                cancelled=self._cancelled,
                components={name: Counter(sizes) for name, sizes in self._worker.components.items()},
                one_at_a_time=tuple(dict.fromkeys(self._served.apart.values())),
            )

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop accepting requests, finish or end those accepted, and release the pipeline. May be called repeatedly.

        Args:
            drain: whether to let waiting and running requests finish first; otherwise they end before their next step
                with an `EngineClosedError`.
            timeout: the number of seconds after which unfinished requests are ended anyway.
        """
        with self._lock:
            self._closing = True
            if drain:
                self._for_close.wait_for(lambda: not self._queue and not self._running, timeout)
            left = [*self._queue, *self._running.values()]
        for request in left:
            self._end(request, EngineClosedError(f"The engine was closed before the request {request.id} finished."))
        with self._lock:
            if not self._for_close.wait_for(lambda: not self._running, PATIENCE):
                logger.warning("%d requests have not ended %.0f s after close().", len(self._running), PATIENCE)
                return
            self._stopped = True
            first, self._released = not self._released, True
            self._for_threads.notify_all()
            self._worker.stop()
        if first:
            for thread in self._threads:
                thread.join()
            self._worker.join()
            self._served.close()
            atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)
