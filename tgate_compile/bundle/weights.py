"""Hash, write, index and memory-map the weights of a bundle."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from tgate_compile._errors import BundleError
from tgate_compile.bundle.manifest import WEIGHTS_FILE, Count, Dtype, Name
from tgate_compile.engine.samples import sums_of_bits
from tgate_compile.engine.weights import plain_tensors


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of `tensor` in C order, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weights_digest(denoiser: torch.nn.Module) -> str:
    """Return the SHA-256 digest of a line `name dtype shape sha256` for each parameter and buffer, sorted by name.

    A line is, for example, `conv_in.bias float32 4 9f86d0...`; its hash is that of the bytes in C order, little-endian.
    """
    digest = hashlib.sha256()
    named = sorted(plain_tensors(denoiser).items())
    for (name, tensor), content in zip(named, _contents([tensor for _, tensor in named]), strict=True):
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"{name} {dtype_name(tensor.dtype)} {shape} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


#: How many bytes are fetched from a device at a time.
_FETCHED = 256 << 20


def _contents(tensors: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of each tensor, in C order. Those on other devices than the CPU are fetched many at a time."""
    for device, group in itertools.groupby(tensors, key=lambda tensor: tensor.device):
        if device.type == "cpu":
            yield from map(tensor_bytes, group)
        else:
            yield from fetched(group)


def fetched(tensors: Iterable[torch.Tensor], at_most: int = _FETCHED) -> Iterator[memoryview]:
    """Yield the bytes of each tensor, in C order. They are copied to the CPU together, `at_most` bytes at a time."""
    waiting: list[torch.Tensor] = []
    for tensor in tensors:
        if waiting and sum(each.nbytes for each in waiting) + tensor.nbytes > at_most:
            yield from _split(waiting)
            waiting = []
        waiting.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    if waiting:
        yield from _split(waiting)


def _split(tensors: Sequence[torch.Tensor]) -> Iterator[memoryview]:
    content, start = tensor_bytes(torch.cat(list(tensors))), 0
    for tensor in tensors:
        yield content[start : start + tensor.nbytes]
        start += tensor.nbytes


def bit_sums(denoiser: torch.nn.Module) -> tuple[int, ...]:
    """Return a sum over the bits of each weight: much faster than the digest, and different after any usual change."""
    return tuple(sums_of_bits(plain_tensors(denoiser).values()))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without `torch.`, such as `float32`."""
    return str(dtype).removeprefix("torch.")


#: Large tensors start at a page boundary, so that a runtime can map them; small ones are aligned for any element type.
PAGE = 4096
ALIGNMENT = 64
LARGE = 1 << 20


class WeightsFile:
    """A weights file to which tensors are appended. At most one tensor is copied at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets: dict[tuple[bytes, int], int] = {}
        self._size = 0

    def add(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Return the offset and the length of the bytes of `tensor`, after writing them unless the file has them."""
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


#: The index of the weights file. In a safetensors file, equal tensors could not share bytes, nor large ones be aligned.
INDEX_FILE = "graphs/weights.json"
MAX_INDEX_BYTES = 50_000_000

MSG_INDEX = "{path} is not a valid index of a weights file: {problem}."


class Place(BaseModel):
    """The location of a tensor in the weights file, in C order, little-endian.

    Compiled code may expect the tensor in another layout in memory: `order` has its dimensions then, outermost first.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dtype: Dtype
    shape: Annotated[list[Count], Field(max_length=16)]
    offset: Count
    length: Count
    order: Annotated[list[Count], Field(max_length=16)] | None = None


class _Index(RootModel[dict[Name, Place]]):
    pass


def order_of(tensor: torch.Tensor) -> list[int] | None:
    """Return the dimensions of `tensor`, outermost in memory first; None if it is in C order or has gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return None if tensor.is_contiguous() or not tensor.permute(order).is_contiguous() else order


def in_order(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return `tensor`, which is in C order, with the layout of `order_of`."""
    if order is None:
        return tensor
    return tensor.permute(*order).contiguous().permute(*(order.index(dim) for dim in range(tensor.ndim)))


def write_weights(
    tensors: Mapping[str, torch.Tensor], weights: WeightsFile, index: Path, *, keep_layout: bool = False
) -> None:
    """Add `tensors` to `weights`, and write their locations to the file `index`, with their layouts if asked."""
    places = {}
    for name, tensor in tensors.items():
        offset, length = weights.add(tensor)
        place: dict[str, object] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        place |= {"offset": offset, "length": length}
        order = order_of(tensor) if keep_layout else None
        place |= {} if order is None else {"order": order}
        places[name] = json.dumps(place)
    lines = ",\n".join(f" {json.dumps(name)}: {place}" for name, place in places.items())
    index.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_index(path: Path, weights_size: int) -> dict[str, Place]:
    """Return the location of each tensor in a weights file of `weights_size` bytes, by name.

    Raises:
        BundleError: the file is not a valid index, or a tensor is not within the weights file.
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
            raise BundleError(
                f"{path} places the tensor {name[:200]!r} at bytes {place.offset} to {end}, which is not a valid "
                f"location of a tensor of dtype {place.dtype} and shape {place.shape}."
            )
        if place.order is not None and sorted(place.order) != list(range(len(place.shape))):
            raise BundleError(
                f"{path} has the order {place.order} for the tensor {name[:200]!r}, which is not an order of the "
                f"dimensions of the shape {place.shape}."
            )
    return places


class MappedWeights:
    """The tensors in the weights file of the bundle at `root`, on `device`.

    On the CPU they are memory-mapped, so a page is read when it is first used; on other devices they are copies.

    Raises:
        BundleError: the index does not fit the weights file.
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
        """Return the tensors called `names`; every call returns the same objects.

        Raises:
            BundleError: the bundle does not have one of them.
        """
        names = list(names)
        missing = [name for name in names if name not in self._places]
        if missing:
            raise BundleError(
                f"The bundle {self._root} does not have the weights {', '.join(missing[:5])}, which its graphs need."
            )
        for name in names:
            if name not in self._tensors:
                self._tensors[name] = in_order(self._tensor(name).to(self._device), self._places[name].order)
        return {name: self._tensors[name] for name in names}

    def _tensor(self, name: str) -> torch.Tensor:
        place = self._places[name]
        content = self._content[place.offset : place.offset + place.length]
        return content.view(getattr(torch, place.dtype)).view(place.shape)


_MAPPED: weakref.WeakValueDictionary[object, MappedWeights] = weakref.WeakValueDictionary()


def mapped_weights(root: Path, device: torch.device) -> MappedWeights:
    """Return the weights of the bundle at `root`; while an object is in use, every call returns the same one.

    Raises:
        BundleError: as `MappedWeights`.
        OSError: as `MappedWeights`.
    """
    stat = os.stat(root / WEIGHTS_FILE)  # a bundle may be replaced by another one with the same name
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, str(device))
    found = _MAPPED.get(key)
    if found is None:
        found = _MAPPED[key] = MappedWeights(root, device)
    return found
