"""Memory that a closed graph has left behind."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give what is free back to the system. glibc keeps it for later otherwise, and the next graph is large, too."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
