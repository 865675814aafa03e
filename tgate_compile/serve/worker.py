"""The worker of an engine, which runs the denoiser calls of its requests in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tgate_compile._errors import first_line
from tgate_compile.engine.traffic import running
from tgate_compile.serve.requests import Ended, Gate, Request

if TYPE_CHECKING:
    from tgate_compile.serve.engine import Engine

logger = logging.getLogger(__name__)

#: The longest time that a batch waits for requests that are between two steps, in seconds.
LONGEST_WAIT = 0.05
#: The largest share of padding in a batch before times have been measured.
MOST_PADDING = 0.25


class RunApart(Exception):  # noqa: N818 (it is not an error)
    """Raised for work items that cannot be run together.

    Attributes:
        groups: the positions of the work items that can be run together.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = groups


class Work(Protocol):
    """A denoiser call of one request, or something else to be run by the engine's worker.

    Attributes:
        key: items with equal keys can be run together; None if this one runs alone.
        images: the number of images that it adds to a batch.
        letter: the letter of the phase of its graph; empty if it is something else.
        component: the name of the text encoder or VAE that is called; empty if it is something else.
        is_last: whether it is the last call of the request's loop, as far as is known.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def images(self) -> int: ...

    @property
    def letter(self) -> str: ...

    @property
    def component(self) -> str: ...

    @property
    def is_last(self) -> bool: ...


@dataclass(eq=False)
class Job:
    """A function that the worker runs alone."""

    function: Callable[[], Any]
    key: Hashable = None
    images: int = 1
    letter: str = ""
    component: str = ""
    is_last: bool = False


class Submission:
    """A work item that waits for the worker, is being run, or has been run."""

    def __init__(self, work: Work, request: Request | None) -> None:
        self.work = work
        self.request = request
        self.arrived = time.monotonic()
        self.result: Any = None
        self.error: BaseException | None = None
        self.gate = Gate()


class Served(Protocol):
    """A pipeline as the engine serves it."""

    @property
    def captures(self) -> int:
        """The number of graphs that have been compiled."""
        ...

    @property
    def apart(self) -> Mapping[Hashable, str]:
        """The graphs and components that run one request at a time, with the reason for each."""
        ...

    def check(self, call: Mapping[str, Any], lora: Mapping[str, float] | None) -> None:
        """Raise ConfigurationError if the pipeline does not know these arguments or adapters."""
        ...

    def run(self, request: Request, engine: Engine) -> Any:
        """Run the pipeline's call for `request`, in whose thread it is called. Denoiser calls go to the engine."""
        ...

    def execute(self, works: Sequence[Work]) -> Sequence[Any]:
        """Run work items with equal keys together, and return the result of each. Called by the worker.

        Raises:
            RunApart: not all of them can be run together.
        """
        ...

    def keep_apart(self, work: Work, reason: str) -> None:
        """Give work items like this one different keys from now on."""
        ...

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`."""
        ...

    def warm_up(self, engine: Engine, calls: Sequence[Mapping[str, Any]]) -> None:
        """Compile and check the graphs that calls like `calls` need, for all batch sizes."""
        ...

    def rest(self) -> None:
        """Free what is kept from batch to batch. Called by the worker when no request is in progress."""
        ...

    def close(self) -> None:
        """Release the pipeline."""
        ...


class Worker:
    """Runs submitted work items in a thread: the one that has waited longest, and those that can be run with it.

    All methods are called with `lock` held, except `join`.

    Args:
        served: runs the work items.
        lock: protects the state of the engine.
        max_batch: the largest number of images in a batch.
        stepping: returns the last work item of each request that is between two steps.
        watch: called whenever the worker waits; ends late requests, and returns when it has to be called again.
        lose: called with the submissions that are lost, and the reason, when the worker has failed.

    Attributes:
        alive: whether the thread runs.
        batches: the number of batches by letter of the phase, and by the number of images.
        seconds: the time spent in graphs, by the letter of the phase.
        components: the number of batches by the name of the text encoder or VAE, and by the number of rows.
    """

    def __init__(
        self,
        served: Served,
        lock: threading.Lock,
        *,
        max_batch: int,
        stepping: Callable[[], Iterable[Work]],
        watch: Callable[[], float | None],
        lose: Callable[[Sequence[Submission], BaseException], None],
    ) -> None:
        self._served = served
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._max_batch = max_batch
        self._stepping = stepping
        self._watch = watch
        self._lose = lose
        self._submissions: list[Submission] = []
        self._in_hand: Sequence[Submission] = ()  # what is being run
        # Seconds per run, by key and number of images. The first run is not measured: it includes the compilation of
        # the graph, and its comparison with single runs.
        self._times: dict[tuple[Hashable, int], float | None] = {}
        self._is_resting = True
        self._stopped = False
        self.alive = False
        self.batches: dict[str, Counter[int]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)
        self.components: dict[str, Counter[int]] = defaultdict(Counter)
        self._start()

    def put(self, submission: Submission) -> None:
        """Submit a work item. Its gate is opened once it has been run or is lost."""
        self._submissions.append(submission)
        if len(self._submissions) == 1 or not self._joining():
            self._changed.notify()

    def withdraw(self, request: Request, reason: Exception) -> None:
        """Stop `request` from waiting for a submission that is not being run yet, because it has to end."""
        submission = request.submission
        if submission in self._submissions:
            self._submissions.remove(submission)
            submission.error = Ended(reason)
            submission.gate.open()

    def wake(self) -> None:
        """Wake the worker, because the state has changed."""
        self._changed.notify()

    def stop(self) -> None:
        """Stop once everything that was submitted has been run."""
        self._stopped = True
        self._changed.notify()

    def forget(self) -> None:
        """Reset the totals."""
        self.batches.clear()
        self.seconds.clear()
        self.components.clear()

    def join(self) -> None:
        """Wait for the thread to end, after `stop`."""
        self._thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="tgate-worker", daemon=True)
        thread.start()
        self._thread = thread  # another thread may be about to join it
        self.alive = True

    def _work(self) -> None:
        try:
            while group := self._next():
                self._run(group)
                self._in_hand = ()
        except BaseException as error:
            logger.critical("The engine's worker has failed and is restarted.", exc_info=error)
            with self._lock:
                self.alive = False
                lost = [*self._in_hand, *self._submissions]
                self._in_hand, self._submissions = (), []
                self._lose(lost, error)
            for submission in lost:
                submission.gate.open()
            self._start()

    def _next(self) -> list[Submission]:
        """Wait for submissions, and return a group to run; it is empty if the worker has to stop.

        The group is that of the submission that has waited longest, so that each gets its turn. If requests that are
        between two steps are about to join the group, the worker waits for them, but no longer than this saves.
        """
        with self._lock:
            free_since = time.monotonic()
            while True:
                until = self._watch()
                if self._submissions:
                    due = max(self._submissions[0].arrived, free_since) + self._patience()
                    if time.monotonic() >= due:
                        self._in_hand = group = self._choose()
                        self._is_resting = False
                        for submission in group:
                            self._submissions.remove(submission)
                        return group
                    until = due if until is None else min(until, due)
                elif self._stopped:
                    return []
                elif not self._is_resting and until is None:
                    self._is_resting = True
                    self._served.rest()
                self._changed.wait(None if until is None else max(until - time.monotonic(), 0.001))

    def _joining(self) -> int:
        """Return the number of images that are about to join the oldest submission; 0 if its batch is full."""
        key = self._submissions[0].work.key
        if key is None or _total(self._alike()) >= self._max_batch:
            return 0
        return sum(work.images for work in self._stepping() if work.key == key)

    def _patience(self) -> float:
        """Return how long the oldest submission may wait for others, in seconds: the time that joining them saves."""
        joining = self._joining()
        if not joining:
            return 0.0
        here = _total(self._alike())
        joining = min(joining, self._max_batch - here)
        key = self._submissions[0].work.key
        sizes = [size_of(images, self._max_batch) for images in (here, joining, here + joining)]
        one, other, both = (self._times.get((key, size)) for size in sizes)
        if one is None or other is None or both is None:
            return LONGEST_WAIT
        return min(LONGEST_WAIT, one + other - both)

    def _alike(self) -> list[Submission]:
        """Return the oldest submission and those that can be run with it, by age."""
        key = self._submissions[0].work.key
        if key is None:
            return self._submissions[:1]
        return [each for each in self._submissions if each.work.key == key]

    def _choose(self) -> list[Submission]:
        """Return as many submissions of the oldest one's group as are best run at a time."""
        group = _first(self._alike(), self._max_batch)
        total, sizes = _total(group), batch_sizes(self._max_batch)
        if len(group) == 1 or total in sizes:
            return group
        key = group[0].work.key
        lower = max(size for size in sizes if size < total)
        upper = min(size for size in sizes if size > total)
        padded, cut = self._times.get((key, upper)), self._times.get((key, lower))
        if padded is not None and cut is not None:
            pads = total / padded >= lower / cut
        else:
            pads = total >= (1 - MOST_PADDING) * upper
        return group if pads else _first(group, lower)

    def _run(self, group: Sequence[Submission]) -> None:
        """Run a group, and let its requests continue. If that fails, run each of them alone."""
        works = [submission.work for submission in group]
        began = time.perf_counter()
        try:
            with running():
                results = self._served.execute(works)
        except RunApart as parts:
            for positions in parts.groups:
                self._run([group[position] for position in positions])
            return
        except Exception as error:
            if len(group) == 1:
                group[0].error = error
            else:
                reason = first_line(error, named=True)
                logger.warning("A batch of %d requests failed (%s). Running each of them alone.", len(group), reason)
                for submission in group:
                    self._run([submission])
                if all(submission.error is None for submission in group):
                    self._served.keep_apart(works[0], f"a batch failed: {reason}")
                return
        else:
            for submission, result in zip(group, results, strict=True):
                submission.result = result
        self._deliver(group, time.perf_counter() - began)

    def _deliver(self, group: Sequence[Submission], seconds: float) -> None:
        work, images = group[0].work, _total(group)
        with self._lock:
            if work.letter:
                self.batches[work.letter][images] += 1
                self.seconds[work.letter] += seconds
            if work.component:
                self.components[work.component][images] += 1
            if work.key is not None:
                at = work.key, size_of(images, self._max_batch)
                if at not in self._times:
                    self._times[at] = None
                else:
                    before = self._times[at] or seconds
                    self._times[at] = seconds if seconds < before / 2 else 0.7 * before + 0.3 * min(seconds, 2 * before)
            for submission in group:
                if submission.request is not None and submission.error is None and work.key is not None:
                    submission.request.stepping = None if submission.work.is_last else submission.work
        for submission in group:
            submission.gate.open()


def batch_sizes(most: int) -> list[int]:
    """Return the numbers of images that batches of at most `most` images have."""
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*sizes, most]


def size_of(images: int, most: int) -> int:
    """Return the number of images, with padding, of a batch of `images`."""
    return min((size for size in batch_sizes(most) if size >= images), default=images)


def _first(group: Sequence[Submission], most: int) -> list[Submission]:
    """Return the first of `group` with at most `most` images together, and at least one of them."""
    taken: list[Submission] = []
    for submission in group:
        if taken and sum(each.work.images for each in taken) + submission.work.images > most:
            break
        taken.append(submission)
    return taken


def _total(group: Sequence[Submission]) -> int:
    return sum(each.work.images for each in group)
