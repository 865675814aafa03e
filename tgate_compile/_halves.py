"""The two halves of classifier-free guidance: checked, taken apart, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._call import Call
from tgate_compile._errors import UnsupportedModelError
from tgate_compile._families import Family
from tgate_compile._schedule import Half

MSG_NOT_TWO_HALVES = (
    "Guidance is on, but the denoiser's batch {shape} is not [uncond; cond] over the same latents, so its halves "
    "cannot be merged at the gate. Three-way guidance (InstructPix2Pix) and perturbed guidance (PAG) are not "
    "supported. "
    "What works instead: the pipeline without tgate_compile, or with guidance off."
)


def check_halves(latents: torch.Tensor, *, same: bool) -> None:
    """Check that `latents`, [2B, ...], are two halves; with `same`, of the same latents.

    Raises:
        UnsupportedModelError: they are not.
    """
    batch = latents.shape[0]
    if batch % 2 or (same and not torch.equal(latents[: batch // 2], latents[batch // 2 :])):
        raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))


def one_half(call: Call, batch: int, keep: Half, family: Family) -> Call:
    """`call`, whose latents have a batch of `batch` = 2B, for its half `keep` alone."""
    position = family.order.index(keep)
    interleaved, repeated, shared = (
        {id(leaf) for path in paths for leaf in leaves_at(call, path)}
        for paths in (family.interleaved, family.repeated, family.shared)
    )

    def half(leaf: torch.Tensor) -> torch.Tensor:
        has_halves = leaf.ndim > 0 and leaf.shape[0] == batch and id(leaf) not in shared
        if not has_halves and id(leaf) not in repeated:
            return leaf  # both halves' alike: a timestep, a mask
        return leaf[position::2] if id(leaf) in interleaved else leaf.chunk(2)[position]

    return call.map_tensors(half)


def similarity(prediction: torch.Tensor, channels: int) -> float:
    """The cosine similarity of the halves of `prediction`, [2B, channels or more, ...]: the least in the batch.

    Source: arXiv 2312.12487, equation 7. Channels beyond the latents' own are a learned variance, and left out.
    """
    uncond, cond = prediction[:, :channels].float().flatten(1).chunk(2)
    return float(torch.cosine_similarity(uncond, cond, dim=1).min())


def leaves_at(call: Call, path: tuple[str, ...]) -> list[Any]:
    """What is at `path` of the call's keyword arguments, e.g. ("added_cond_kwargs", "time_ids")."""
    value: Any = call.arguments[1]
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return pytree.tree_leaves(value)
