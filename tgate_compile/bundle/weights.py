"""The weights of a bundle: their digest, the file that holds them, its index, and mapping them into memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from tgate_compile._errors import BundleError
from tgate_compile.bundle.manifest import WEIGHTS_FILE, Count, Dtype, Name
from tgate_compile.engine.trust import as_integers
from tgate_compile.engine.weights import plain_tensors


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` in C order: its own memory, if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weights_digest(denoiser: torch.nn.Module) -> str:
    """SHA-256 over a line `name dtype shape sha256` for each parameter and buffer, sorted by name.

    For example `conv_in.bias float32 4 9f86d0...`; the inner hash is that of the bytes in C order, little-endian.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_tensors(denoiser).items()):
        shape = "x".join(map(str, tensor.shape))
        content = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        digest.update(f"{name} {dtype_name(tensor.dtype)} {shape} {content}\n".encode())
    return digest.hexdigest()


def bit_sums(denoiser: torch.nn.Module) -> tuple[int, ...]:
    """A sum over the bits of each weight: far quicker than the digest, and unequal after any ordinary change."""
    return tuple(int(as_integers(tensor).sum()) for tensor in plain_tensors(denoiser).values())


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


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


#: Beside the weights. Not safetensors: there, equal tensors cannot share bytes, and large ones not begin at a page.
INDEX_FILE = "graphs/weights.json"
MAX_INDEX_BYTES = 50_000_000

MSG_INDEX = "{path} is no index of a weights file: {problem}."
MSG_PLACE = "{path} has the tensor {name!r} at bytes {offset} to {end}, which is not where a {dtype} {shape} can be."


class Place(BaseModel):
    """A tensor in the weights file, in C order, little-endian."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dtype: Dtype
    shape: Annotated[list[Count], Field(max_length=16)]
    offset: Count
    length: Count


class _Index(RootModel[dict[Name, Place]]):
    pass


def write_weights(tensors: Mapping[str, torch.Tensor], weights: WeightsFile, index: Path) -> None:
    """Add `tensors` to `weights`, and say in the file `index` where each of them is."""
    places = {}
    for name, tensor in tensors.items():
        offset, length = weights.add(tensor)
        place = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "offset": offset, "length": length}
        places[name] = json.dumps(place)
    lines = ",\n".join(f" {json.dumps(name)}: {place}" for name, place in places.items())
    index.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_index(path: Path, weights_size: int) -> dict[str, Place]:
    """Where each tensor is in a weights file of so many bytes, by its name.

    Raises:
        BundleError: the file is no index, or a tensor does not lie in the weights file.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise BundleError(MSG_INDEX.format(path=path, problem="it is too large"))
    try:
        places = _Index.model_validate_json(path.read_bytes()).root
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise BundleError(MSG_INDEX.format(path=path, problem=problem)) from error
    for name, place in places.items():
        end = place.offset + place.length
        size = math.prod(place.shape) * getattr(torch, place.dtype).itemsize
        if place.length != size or end > weights_size or place.offset % ALIGNMENT:
            told = {"offset": place.offset, "end": end, "dtype": place.dtype, "shape": place.shape}
            raise BundleError(MSG_PLACE.format(path=path, name=name[:200], **told))
    return places


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
            raise BundleError(
                f"The bundle {self._root} has no weights called {', '.join(missing[:5])}, which its graphs ask for."
            )
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
