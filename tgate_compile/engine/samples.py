"""Find out whether weights have changed, from sums over their bits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

import torch

#: The minimum number of elements of a weight that are sampled once per image.
SAMPLES = 1024

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # the widest first

Made = TypeVar("Made")


class MadeOfWeights(Generic[Made]):
    """A value that `make` computes from the weights, recomputed when they have changed."""

    def __init__(self, make: Callable[[Sequence[torch.Tensor]], Made]) -> None:
        self._make = make
        self._seen: Sequence[torch.Tensor] | None = None
        self._sampler = WeightSamples()
        self._samples: list[tuple[int, int]] = []
        self._made: list[Made] = []
        self._count = 0

    @property
    def remade(self) -> int:
        """How often the value has been computed again because the weights had changed."""
        return max(0, self._count - 1)

    def release(self) -> None:
        """Release the value and the weights."""
        self._made, self._samples, self._seen = [], [], None
        self._sampler.release()

    def of(self, weights: Sequence[torch.Tensor], used: Sequence[int] | None = None) -> Made:
        """Return the value for `weights`, or for those at the positions `used`."""
        # The library passes a new list at the start of each generation; only then can a weight have changed.
        if not self._made or weights is not self._seen:
            tensors = weights if used is None else [weights[position] for position in used]
            samples = self._sampler.of(tensors)
            if not self._made or samples != self._samples:
                self._made = [self._make(tensors)]
                self._count += 1
                self._samples = samples
            self._seen = weights
        return self._made[0]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of `tensor` as a one-dimensional tensor of the widest integers that its size and place allow.

    On a CPU, torch adds int64 twelve times as fast as int32, which it converts first.
    """
    flat = tensor.detach().contiguous().view(-1)
    place = flat.storage_offset() * flat.itemsize
    return flat.view(next(each for each in _INTEGERS if flat.nbytes % each.itemsize == place % each.itemsize == 0))


def sums_of_bits(tensors: Iterable[torch.Tensor], at_most: int | None = None) -> list[int]:
    """Return a sum over the bits of each tensor, of about `at_most` integers each; None means all.

    All results of a device are fetched at once: waiting for each of a thousand tensors would take longer than a step.
    """
    sums: list[torch.Tensor] = []
    for tensor in tensors:
        bits = as_integers(tensor)
        sums.append((bits if at_most is None else bits[:: max(1, bits.numel() // at_most)]).sum())
    found = [0] * len(sums)
    for device in {each.device for each in sums}:
        places = [place for place, each in enumerate(sums) if each.device == device]
        for place, value in zip(places, torch.stack([sums[place] for place in places]).tolist(), strict=True):
            found[place] = value
    return found


class WeightSamples:
    """Values that differ once a weight has changed: torch's version counter, and a sum over samples of its bits.

    The samples detect changes that bypass the counter, such as peft's merging through `.data`, which changes a weight
    everywhere. They are taken from the same places again and again, so where these are is found out only once.
    """

    def __init__(self) -> None:
        self._places: list[Hashable] = []
        # For each device and type of integer: the weights' positions, views of their samples, and the last of each.
        self._groups: list[tuple[list[int], list[torch.Tensor], list[int]]] = []

    def of(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        """Return the values of all `tensors`."""
        places: list[Hashable] = [
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors
        ]
        if places != self._places:
            self._places = places if self._find(tensors) else []
        sums = [0] * len(tensors)
        for positions, views, ends in self._groups:
            # All at once: a thousand small operations would take longer than a step.
            totals = torch.cat(views).cumsum(0)[ends].tolist()
            for position, total, before in zip(positions, totals, [0, *totals], strict=False):
                sums[position] = (total - before) % 2**64  # the running total may have overflowed
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        return list(zip(versions, sums, strict=True))

    def release(self) -> None:
        """Release the weights."""
        self._places, self._groups = [], []

    def _find(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Make views of the samples. Returns whether all of them are views of the weights, and not of copies."""
        found: dict[Hashable, tuple[list[int], list[torch.Tensor]]] = {}
        lasting = True
        for position, tensor in enumerate(tensors):
            # In the order of the memory, in which the dimensions of channels-last weights are contiguous as well.
            order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
            bits = as_integers(tensor.permute(order))
            lasting &= bits.data_ptr() == tensor.data_ptr()
            if bits.numel():
                positions, views = found.setdefault((bits.device, bits.dtype), ([], []))
                positions.append(position)
                views.append(bits[:: max(1, bits.numel() // SAMPLES)])
        self._groups = [
            (positions, views, [end - 1 for end in accumulate(view.numel() for view in views)])
            for positions, views in found.values()
        ]
        return lasting
