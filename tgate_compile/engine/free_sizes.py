"""Which sizes of a denoiser's inputs a graph leaves free: the batch, the height and width of the latents."""

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

#: How each is called in shapes: `[2*b, 4, 8*h, 8*w]`.
SYMBOLS: Mapping[FreeSize, str] = {"batch": "b", "height": "h", "width": "w"}
#: diffusers' upsampling branches at a batch of 64, which 31 prompts under guidance do not reach.
LARGEST: Mapping[FreeSize, int] = {"batch": 31, "height": 1024, "width": 1024}


@dataclass(frozen=True)
class FreeShapes:
    """A call to capture, and which of its sizes are free.

    Attributes:
        call: the arguments; a free batch is at least 2 prompts, for torch takes a size of 1 as part of the graph.
        shapes: the free dimensions of each tensor; None if there are none.
        units: what one of each symbol stands for in the latents' shape, e.g. `{"b": 2, "h": 8, "w": 8}`: the batch of
            a guided call is twice the prompts, and a UNet that halves three times takes multiples of 8.
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
    """`call` with the sizes `free` left open; `guided` if its batch has both guidance halves.

    Tensors whose first dimension is the latents' batch have that batch, except those that both halves share; tensors of
    as many dimensions as the latents are as high and wide, or an even part of it (a ControlNet's residuals).
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
            leaf = leaf.clone()  # ShapesCollection knows tensors by identity
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
    """What height and width of the latents must be multiples of: a UNet's downsampling, a transformer's patch."""
    blocks = getattr(denoiser, "down_blocks", ())
    halvings = sum(1 for block in blocks if getattr(block, "downsamplers", None) is not None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    return int(math.prod((2**halvings, patch if isinstance(patch, int) else 1)))


def _times(factor: int, dim: Any) -> Any:
    return dim if factor == 1 else factor * dim
