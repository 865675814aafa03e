"""The inputs of one denoiser call, flattened: tensors by position, everything else as part of the key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the denoiser.

    Attributes:
        leaves: tensors and constants, in pytree order.
        spec: how the leaves make up (args, kwargs).
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(tuple(leaf.detach() if torch.is_tensor(leaf) else leaf for leaf in leaves), spec)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) again."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs

    @property
    def key(self) -> Hashable:
        """What a captured graph depends on: structure, shapes, dtypes, devices, and the constants themselves.

        Not strides: a VAE's latents are channels-last, the scheduler's are not, and one graph serves both.
        """
        return (
            self.spec,
            tuple(
                (leaf.shape, leaf.dtype, leaf.device) if torch.is_tensor(leaf) else _constant(leaf)
                for leaf in self.leaves
            ),
        )

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """This call with `function(tensor)` in place of each tensor."""
        return Call(tuple(function(leaf) if torch.is_tensor(leaf) else leaf for leaf in self.leaves), self.spec)


def _constant(leaf: object) -> Hashable:
    # True == 1 == 1.0, but graphs made for them differ.
    return (type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf))


#: Sizes that may differ: by the position of a tensor among a call's leaves, its dimensions.
FreeDims = Mapping[int, tuple[int, ...]]


def fits(key: Any, other: Any, free: FreeDims, only: Collection[int] | None = None) -> bool:
    """Whether calls with these keys (`Call.key`) can have the same graph, whose sizes `free` are left open.

    With `only`, the tensors at other positions do not matter.
    """
    if key[0] != other[0]:
        return False
    for position, (mine, its) in enumerate(zip(key[1], other[1], strict=True)):
        if mine == its or (only is not None and position not in only and _is_tensor(mine) and _is_tensor(its)):
            continue
        dims = _differing(mine, its)
        if dims is None or not set(dims) <= set(free.get(position, ())):
            return False
    return True


def differing_dims(key: Any, other: Any) -> FreeDims:
    """The sizes in which calls with these keys differ, beyond their batch; empty if they differ in anything else."""
    found: dict[int, tuple[int, ...]] = {}
    if key[0] != other[0]:
        return {}
    for position, (mine, its) in enumerate(zip(key[1], other[1], strict=True)):
        dims = () if mine == its else _differing(mine, its)
        if dims is None or 0 in dims:
            return {}
        if dims:
            found[position] = dims
    return found


def _is_tensor(part: Any) -> bool:
    return isinstance(part[0], torch.Size)


def _differing(mine: Any, its: Any) -> tuple[int, ...] | None:
    """The dimensions of two tensors that differ; None if more does, or these are no tensors."""
    if not (_is_tensor(mine) and _is_tensor(its)) or mine[1:] != its[1:] or len(mine[0]) != len(its[0]):
        return None
    return tuple(dim for dim, (a, b) in enumerate(zip(mine[0], its[0], strict=True)) if a != b)
