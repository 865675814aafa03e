"""Capture graphs in child processes, so that the other requests of an engine continue.

`torch.export` changes process-wide state, so a capture in the engine's own process pauses all requests
(`engine/traffic.py`). A forked child has the pipeline as it is at that moment. It captures the graphs there and leaves
them in the disk cache, from which the engine's process reads them in a fraction of the time.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress

import torch

from tgate_compile._cache import FOLDER_VARIABLE, disk_cache
from tgate_compile._errors import first_line
from tgate_compile.engine.purity import has_foreign_code
from tgate_compile.engine.traffic import exclusive

logger = logging.getLogger(__name__)

#: Seconds after which a child process is taken to hang. The graphs are then captured in the engine's process.
PATIENCE = 1800.0


def unavailable(denoisers: Iterable[torch.nn.Module]) -> str | None:
    """Return why the graphs of `denoisers` cannot be captured in a child process; None if they can."""
    if sys.platform != "linux":
        return "it needs Linux, where a process with threads can be forked"
    if disk_cache() is None:
        return f"the disk cache, through which graphs are handed over, is switched off ({FOLDER_VARIABLE})"
    for denoiser in denoisers:
        name = type(denoiser).__name__
        uses_cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        if uses_cuda or any(tensor.device.type != "cpu" for tensor in denoiser.parameters()):
            return f"{name} is not on the CPU, and a forked process cannot use a GPU"
        if has_foreign_code(denoiser):
            return f"the graphs of {name} are not kept on disk, because it has code from outside the known libraries"
    return None


class Task:
    """Captures that one child process makes.

    Attributes:
        captures: functions that capture one graph each, by a key that identifies the graph.
    """

    def __init__(self, captures: Mapping[Hashable, Callable[[], None]]) -> None:
        self.captures = captures
        self._finished = threading.Event()

    def finish(self) -> None:
        """Let all threads that wait for the task continue."""
        self._finished.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the child process has ended, and return whether it has."""
        return self._finished.wait(timeout)


class Captures:
    """The captures that are made, or have been made, outside of the engine's process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._done: set[Hashable] = set()
        self._tasks: dict[Hashable, Task] = {}  # those that are not done
        self._queue: deque[Task] = deque()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, captures: Mapping[Hashable, Callable[[], None]]) -> list[Task]:
        """Return the tasks that make those of `captures` that are not done yet, and begin tasks for new ones."""
        with self._lock:
            left = {key: make for key, make in captures.items() if key not in self._done}
            new = {key: make for key, make in left.items() if key not in self._tasks}
            if new and not self._closed:
                task = Task(new)
                self._tasks |= dict.fromkeys(new, task)
                self._queue.append(task)
                self._changed.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="tgate-captures", daemon=True)
                    self._thread.start()
            return list(dict.fromkeys(self._tasks[key] for key in left if key in self._tasks))

    def note(self, key: Hashable) -> None:
        """Note a capture that has been made in the engine's process."""
        with self._lock:
            self._done.add(key)

    def close(self) -> None:
        """End the child process, if there is one, and finish all tasks."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._changed.wait()
                task = self._queue.popleft() if self._queue else None
            if task is None:
                return
            try:
                if not self._closed:
                    self._run(task)
            finally:
                with self._lock:
                    # Those that have failed are captured in the engine's process, which handles the error.
                    self._done |= task.captures.keys()
                    for key in task.captures:
                        del self._tasks[key]
                task.finish()

    def _run(self, task: Task) -> None:
        """Make the captures of `task` in a child process, and wait for it to end."""
        began = time.perf_counter()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=functools.partial(_capture, task), name="tgate-captures", daemon=True)
        # No thread of a pipeline runs now, so none holds a lock of torch that would stay locked in the child forever.
        with exclusive(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in processes with threads
            process.start()
        with self._lock:
            self._process = process
            if self._closed:
                process.kill()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        with self._lock:
            self._process = None
        seconds = time.perf_counter() - began
        if process.exitcode == 0:
            logger.info("%d graphs were captured in the background in %.1f s", len(task.captures), seconds)
        elif not self._closed:
            logger.warning(
                "Graphs could not be captured in the background (the child process ended with the code %d after "
                "%.0f s). They are captured in the engine's process, which pauses all requests.",
                process.exitcode, seconds,
            )  # fmt: skip


def _capture(task: Task) -> None:
    """Make the captures of `task`, in the child process."""
    _close_sockets()
    torch.set_num_threads(1)  # the threads of the parent's pools do not exist here
    failed = False
    for make in task.captures.values():
        try:
            make()
        except Exception as error:  # the denoiser's own code may raise anything
            logger.info("a capture in the background failed: %s", first_line(error, named=True))
            failed = True
    if failed:
        sys.exit(1)


def _close_sockets() -> None:
    """Close the child's copies of all sockets. As long as one is open, the parent cannot close the connection."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder that has just been listed
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))
