"""Whether weights have been changed since a backend has made a copy of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

#: Elements of a weight that are looked at once per image, at least.
SAMPLES = 1024

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Made = TypeVar("Made")


class MadeOfWeights(Generic[Made]):
    """What `make` makes of the weights, made anew when they have changed."""

    def __init__(self, make: Callable[[Sequence[torch.Tensor]], Made]) -> None:
        self._make = make
        self._seen: Sequence[torch.Tensor] | None = None
        self._samples: list[tuple[int, int]] = []
        self._made: list[Made] = []

    def release(self) -> None:
        """Let go of it, and of the weights."""
        self._made, self._samples, self._seen = [], [], None

    def of(self, weights: Sequence[torch.Tensor], used: Sequence[int] | None = None) -> Made:
        """It, for `weights`, or those at the positions `used` of them."""
        # The library hands over a new list at the start of each generation: only then can anything have changed.
        if not self._made or weights is not self._seen:
            tensors = weights if used is None else [weights[position] for position in used]
            samples = [weight_sample(tensor) for tensor in tensors]
            if not self._made or samples != self._samples:
                self._made = [self._make(tensors)]
                self._samples = samples
            self._seen = weights
        return self._made[0]


def weight_sample(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a changed `tensor` from the old one: torch's count of changes, and a sum over samples.

    The samples are for what goes past torch's count, as peft's merging through `.data` does, which changes all of a
    weight. Summing all of it would take a second per image of an SD-1.5.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.itemsize])
    version = 0 if tensor.is_inference() else tensor._version
    return version, int(bits[:: max(1, bits.numel() // SAMPLES)].sum())
