"""What a pass reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassResult:
    """How many places a pass changed; 0 means that it left the graph alone."""

    changes: int
