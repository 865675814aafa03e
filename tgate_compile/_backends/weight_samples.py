"""Whether weights have been changed since a backend has made a copy of them."""

from __future__ import annotations

import torch

#: Elements of a weight that are looked at once per image, at least.
SAMPLES = 1024

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_sample(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells a changed `tensor` from the old one: torch's count of changes, and a sum over samples.

    The samples are for what goes past torch's count, as peft's merging through `.data` does, which changes all of a
    weight. Summing all of it would take a second per image of an SD-1.5.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.itemsize])
    version = 0 if tensor.is_inference() else tensor._version
    return version, int(bits[:: max(1, bits.numel() // SAMPLES)].sum())
