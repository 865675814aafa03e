"""Locks that let one thread capture or compile at a time, while no other thread runs an optimized pipeline.

`torch.export` and the compilers change process-wide state while they work: `torch.nn.Module.__call__` is patched, and
`torch.compiler.is_exporting()` is true in every thread. A module that another thread calls meanwhile ends up in the
wrong graph, or computes with other kernels. So captures and compilations take turns. Each waits until the pipeline
calls of other threads have reached a denoiser call, where these pause until it is done.

Only calls of optimized pipelines and denoisers take part. Modules that a thread calls directly do not.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

#: Seconds that a capture waits for the other threads: one of their callbacks may be waiting for this very thread.
PATIENCE = 60.0

_changed = threading.Condition()
_running: Counter[int] = Counter()  # the number of nested calls, by thread
_waiting: set[int] = set()  # threads that are waiting to capture
_stuck: set[int] = set()  # running threads that did not pause in time, until their next denoiser call
_owner: int | None = None  # the thread that is capturing, or will capture next
_depth = 0


@contextmanager
def running() -> Iterator[None]:
    """Mark the thread as running modules inside the context, so that no other thread captures."""
    me = threading.get_ident()
    with _changed:
        _changed.wait_for(lambda: _owner in (None, me) or _running[me] > 0)
        _running[me] += 1
        _stuck.discard(me)
    try:
        yield
    finally:
        with _changed:
            _stuck.discard(me)
            _running[me] -= 1
            if not _running[me]:
                del _running[me]
            _changed.notify_all()


def give_way() -> None:
    """Let a waiting thread capture; called between two computations of a thread that is `running`."""
    me = threading.get_ident()
    if _owner in (None, me) and not _waiting:  # read without the lock: a waiting thread is noticed at the next call
        return
    with _changed:
        if _owner == me:
            return
        depth = _stop(me)
        try:
            _changed.wait_for(lambda: _owner is None and not _waiting)
        finally:  # also if the wait is interrupted: the caller is about to leave `running`
            _resume(me, depth)


@contextmanager
def exclusive() -> Iterator[None]:
    """Keep other threads from running optimized pipelines inside the context. Contexts may be nested."""
    global _owner, _depth
    me = threading.get_ident()
    depth = 0
    with _changed:
        if _owner != me:
            depth = _stop(me)  # so that two threads that wait to capture do not wait for each other
            _waiting.add(me)
            try:
                _changed.wait_for(lambda: _owner is None)
                _owner = me
            except BaseException:
                _resume(me, depth)
                raise
            finally:
                _waiting.discard(me)
                _changed.notify_all()
        _depth += 1
    try:
        with _changed:
            if not _changed.wait_for(lambda: set(_running) <= _stuck | {me}, PATIENCE):
                _stuck.update(set(_running) - {me})
                logger.warning(
                    "Another thread's pipeline call has been busy for %.0f s. Capturing now, without waiting for it.",
                    PATIENCE,
                )
        yield
    finally:
        with _changed:
            _depth -= 1
            if not _depth:
                _owner = None
            _resume(me, depth)


@contextmanager
def paused() -> Iterator[None]:
    """Count the thread as not running inside the context, where it only waits, so that others may capture."""
    me = threading.get_ident()
    with _changed:
        depth = _stop(me)
    try:
        yield
    finally:
        with _changed:
            try:
                _changed.wait_for(lambda: _owner in (None, me) or not depth)
            finally:  # also if the wait is interrupted: the caller is about to leave `running`
                _resume(me, depth)


def _stop(thread: int) -> int:
    """Mark `thread` as not running, and return its number of nested calls. The lock must be held."""
    depth = _running.pop(thread, 0)
    _stuck.discard(thread)
    _changed.notify_all()
    return depth


def _resume(thread: int, depth: int) -> None:
    """Mark `thread` as running `depth` nested calls again. The lock must be held."""
    if depth:
        _running[thread] = depth
    _changed.notify_all()


def _forget() -> None:
    """Forget the threads of the parent process: a forked child does not have them."""
    global _changed, _owner, _depth
    _changed = threading.Condition()  # one of them may have held the lock
    _running.clear()
    _waiting.clear()
    _stuck.clear()
    _owner, _depth = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
