"""How far a runtime's results may be from PyTorch's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

#: The largest difference that rounding may explain, relative to an output's largest value, by the coarsest dtype.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    # A value may be rounded to another of fp8's few numbers: one step is an eighth, or a quarter.
    torch.float8_e4m3fn: 0.13,
    torch.float8_e5m2: 0.26,
}


def coarsest(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """The one of `dtypes` that rounds most."""
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype])


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of any element, relative to the largest finite element that is expected.

    Infinite if the shapes differ, or if an element is NaN or infinite in one tensor and not the same in the other;
    NaN if no element is finite, so that there is nothing to compare.
    """
    if result.shape != expected.shape:
        return float("inf")
    given, wanted = result.double(), expected.double()
    equal = (given == wanted) | (given.isnan() & wanted.isnan())
    finite = wanted.isfinite()
    if not bool((equal | (finite & given.isfinite())).all()):
        return float("inf")
    if not bool(finite.any()):
        return float("nan")
    difference = (given - wanted).abs().masked_fill(equal, 0.0)
    largest = wanted.abs().masked_fill(~finite, 0.0).max()
    return float(difference.max() / largest.clamp(min=torch.finfo(torch.float32).tiny))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32.

    On a GPU, PyTorch convolves float32 in TF32 unless told otherwise, and would then be further off than what it is
    compared with.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
