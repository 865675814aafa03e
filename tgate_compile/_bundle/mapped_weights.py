"""The weights of a bundle, mapped from its file: in memory once, for however many graphs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch

from tgate_compile._bundle.manifest import WEIGHTS_FILE
from tgate_compile._bundle.weights_index import INDEX_FILE, read_index
from tgate_compile._errors import BundleError

MSG_NO_TENSOR = "The bundle {root} has no weights called {names}, which its graphs ask for."


class MappedWeights:
    """The tensors of the weights file of the bundle at `root`, on `device`.

    On the CPU they are the file's own pages, read when they are first used; elsewhere, copies.

    Raises:
        BundleError: the index is not that of the weights file.
        OSError: a file cannot be read.
    """

    def __init__(self, root: Path, device: torch.device) -> None:
        self._root = root
        self._device = device
        path = root / WEIGHTS_FILE
        size = path.stat().st_size
        self._places = read_index(root / INDEX_FILE, size)
        self._content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self._tensors: dict[str, torch.Tensor] = {}

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those called `names`, the same objects every time.

        Raises:
            BundleError: one of them is not there.
        """
        names = list(names)
        missing = [name for name in names if name not in self._places]
        if missing:
            raise BundleError(MSG_NO_TENSOR.format(root=self._root, names=", ".join(missing[:5])))
        for name in names:
            if name not in self._tensors:
                self._tensors[name] = self._tensor(name).to(self._device)
        return {name: self._tensors[name] for name in names}

    def _tensor(self, name: str) -> torch.Tensor:
        place = self._places[name]
        content = self._content[place.offset : place.offset + place.length]
        return content.view(getattr(torch, place.dtype)).view(place.shape)


_MAPPED: weakref.WeakValueDictionary[object, MappedWeights] = weakref.WeakValueDictionary()


def mapped_weights(root: Path, device: torch.device) -> MappedWeights:
    """The weights of the bundle at `root`, the same object for as long as someone has it.

    Raises:
        BundleError: as `MappedWeights`.
        OSError: as `MappedWeights`.
    """
    told = os.stat(root / WEIGHTS_FILE)  # a bundle may be replaced by another one of its name
    key = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, str(device))
    found = _MAPPED.get(key)
    if found is None:
        found = _MAPPED[key] = MappedWeights(root, device)
    return found
