"""One file for the weights of all graphs: equal contents are there once."""

from __future__ import annotations

import hashlib
from typing import IO

import torch

from tgate_compile._bundle.weights_digest import tensor_bytes

#: Large tensors begin at a page, so that a runtime can map them; small ones where any element type may begin.
PAGE = 4096
ALIGNMENT = 64
LARGE = 1 << 20


class WeightsFile:
    """Writes tensors one after the other. No more than one is ever copied at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets: dict[tuple[bytes, int], int] = {}
        self._size = 0

    def add(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Offset and length of the bytes of `tensor`, which are written unless they are there already."""
        content = tensor_bytes(tensor)
        key = (hashlib.sha256(content).digest(), content.nbytes)
        if key not in self._offsets:
            alignment = PAGE if content.nbytes >= LARGE else ALIGNMENT
            padding = -self._size % alignment
            self._file.write(bytes(padding))
            self._file.write(content)
            self._offsets[key] = self._size + padding
            self._size += padding + content.nbytes
        return self._offsets[key], content.nbytes
