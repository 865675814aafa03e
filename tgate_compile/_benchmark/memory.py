"""The memory that a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak of the resident set to its present size


@dataclass
class Peak:
    """The most memory that was in use; None where it cannot be told.

    Attributes:
        total: in bytes: of torch's allocator on a GPU, of the whole process on a CPU.
        added: what of it came on top of what was in use before.
    """

    total: int | None = None
    added: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Around a piece of work, which it slows down a little; the result is there when it is done."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.total = torch.cuda.max_memory_allocated(device)
        peak.added = peak.total - before
        return
    resident = _resident("VmRSS") if _reset_peak() else None
    yield peak
    if resident is not None:
        peak.total = _resident("VmHWM")
        peak.added = max(peak.total - resident, 0)


def _reset_peak() -> bool:
    _return_freed_memory()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # no Linux, or not allowed
        return False
    return True


def _return_freed_memory() -> None:
    """What is free but has not been given back would hide what the work takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
