"""The inputs of one denoiser call, flattened: tensors by position, everything else as part of the key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
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
