"""One capture at a time, while nothing else of ours runs in this process.

`torch.export` and the compilers change state of the whole process while they work: `torch.nn.Module.__call__` is
patched, and `torch.compiler.is_exporting()` is true in every thread. A module that another thread calls meanwhile ends
up in the wrong graph, or computes with other kernels. So captures and compilations take turns, and wait until the other
threads' pipeline calls are at a denoiser call, where they wait in turn.

Only calls of optimized pipelines and denoisers take part. Modules that a thread of yours calls by itself do not.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

#: How long a capture waits for the others, in seconds. A callback of theirs may be waiting for this very thread.
PATIENCE = 60.0

_changed = threading.Condition()
_running: Counter[int] = Counter()  # by thread: how many nested calls
_waiting: set[int] = set()  # threads that want to capture
_stuck: set[int] = set()  # running threads that have been waited for in vain, until they show that they live
_owner: int | None = None  # the thread that captures, or is the next to
_depth = 0


@contextmanager
def running() -> Iterator[None]:
    """The thread runs modules, so that no other thread may capture."""
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
    """Between two computations of a thread that is `running`: let a thread capture that waits for this one."""
    me = threading.get_ident()
    if _owner in (None, me) and not _waiting:  # read without the lock: whoever waits is seen at the next call
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
    """No other thread runs modules of ours. Contexts may be nested."""
    global _owner, _depth
    me = threading.get_ident()
    depth = 0
    with _changed:
        if _owner != me:
            depth = _stop(me)  # so that threads that want to capture do not wait for each other
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


def _stop(thread: int) -> int:
    """With the lock held: the thread does not run modules until it resumes. Returns how many calls it is inside of."""
    depth = _running.pop(thread, 0)
    _stuck.discard(thread)
    _changed.notify_all()
    return depth


def _resume(thread: int, depth: int) -> None:
    """With the lock held: the thread is inside of so many calls again."""
    if depth:
        _running[thread] = depth
    _changed.notify_all()
