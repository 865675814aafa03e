"""Compare results numerically."""

from __future__ import annotations

import torch

#: Largest difference, relative to the largest value, that rounding can explain.
ROUNDING = 1e-5
#: Smallest difference that shows that something else was computed.
VISIBLE = 1e-3


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value of `b`."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert difference(a, b) <= ROUNDING


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert difference(a, b) >= VISIBLE
