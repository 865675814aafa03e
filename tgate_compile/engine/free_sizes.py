"""Free sizes of a graph's inputs: the batch, and the height and width of the latents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.export import Dim, ShapesCollection

from tgate_compile.engine.call import Call
from tgate_compile.engine.families import Family
from tgate_compile.engine.halves import latents_of, leaves_at

FreeSize = Literal["batch", "height", "width"]

#: The symbol of each free size in shapes: `[2*b, 4, 8*h, 8*w]`.
SYMBOLS: Mapping[FreeSize, str] = {"batch": "b", "height": "h", "width": "w"}
#: The upsampling layers of diffusers branch at a batch of 64, which 31 prompts under guidance do not reach.
LARGEST: Mapping[FreeSize, int] = {"batch": 31, "height": 1024, "width": 1024}


@dataclass(frozen=True)
class FreeShapes:
    """A call to capture with some of its sizes left free.

    Attributes:
        call: the arguments. A free batch has at least 2 prompts, since torch.export specializes on a size of 1.
        shapes: the free dimensions of each tensor; None if there are none.
        units: the factor of each symbol in the latents' shape, such as `{"b": 2, "h": 8, "w": 8}`: the batch of a
            guided call is twice the number of prompts, and a UNet with three downsamplings takes multiples of 8.
    """

    call: Call
    shapes: ShapesCollection | None
    units: Mapping[str, int]


def free_shapes(
    denoiser: torch.nn.Module,
    forward: Callable[..., Any],
    call: Call,
    family: Family,
    *,
    guided: bool,
    free: Collection[FreeSize],
) -> FreeShapes:
    """Return `call` with the sizes `free` left free; `guided` means that its batch has both guidance halves.

    A tensor has the batch in its first dimension if that has the size of the latents' batch, unless both halves share
    the tensor. A tensor with as many dimensions as the latents has their height and width, or a whole fraction of them
    (a ControlNet's residuals).
    """
    if not free:
        return FreeShapes(call, None, {})
    args, kwargs = call.arguments
    latents = latents_of(inspect.signature(forward).bind(*args, **kwargs).arguments)
    per_prompt = 2 if guided else 1
    batch = latents.shape[0]
    repeated, shared = (
        {id(leaf) for path in paths for leaf in leaves_at(call, path)} for paths in (family.repeated, family.shared)
    )
    step = downsampling(denoiser)
    dims = {name: Dim(symbol, min=1, max=LARGEST[name]) for name, symbol in SYMBOLS.items() if name in free}
    tiles = 2 if batch == per_prompt and "batch" in free else 1

    leaves: list[Any] = []
    specs: list[tuple[torch.Tensor, dict[int, Any]]] = []
    for leaf in call.leaves:
        if not torch.is_tensor(leaf):
            leaves.append(leaf)
            continue
        spec: dict[int, Any] = {}
        has_batch = leaf.ndim > 0 and leaf.shape[0] == batch and id(leaf) not in shared
        if "batch" in free and (has_batch or id(leaf) in repeated):
            spec[0] = _times(leaf.shape[0] // batch * per_prompt, dims["batch"])
            leaf = leaf.repeat(tiles, *[1] * (leaf.ndim - 1))
        else:
            leaf = leaf.clone()  # ShapesCollection identifies tensors by id
        if leaf.ndim == latents.ndim >= 4:
            for name, position in (("height", -2), ("width", -1)):
                size, whole = leaf.shape[position], latents.shape[position]
                if name in free and whole % size == 0 and step % (whole // size) == 0:
                    spec[leaf.ndim + position] = _times(step // (whole // size), dims[name])  # type: ignore[index]
        leaves.append(leaf)
        specs.append((leaf, spec))
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, spec in specs:
        if spec:
            shapes[tensor] = spec
    units = {"batch": per_prompt, "height": step, "width": step}
    return FreeShapes(Call(tuple(leaves), call.spec), shapes, {SYMBOLS[name]: units[name] for name in dims})


def downsampling(denoiser: torch.nn.Module) -> int:
    """Return the number that the latents' height and width must be multiples of.

    It comes from a UNet's downsampling and a transformer's patch size.
    """
    blocks = getattr(denoiser, "down_blocks", ())
    halvings = sum(1 for block in blocks if getattr(block, "downsamplers", None) is not None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    return int(math.prod((2**halvings, patch if isinstance(patch, int) else 1)))


def _times(factor: int, dim: Any) -> Any:
    return dim if factor == 1 else factor * dim
