"""What is where in a weights file, for graphs that ask for their weights by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from tgate_compile._bundle.manifest import Count, Dtype, Name
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._bundle.weights_file import ALIGNMENT, WeightsFile
from tgate_compile._errors import BundleError

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
