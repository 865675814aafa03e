"""The tensors of a module by the names that `torch.export` has for them, and what those mean.

A parameter of a tensor subclass, such as torchao's quantized weights, is exported as the plain tensors inside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by their names; those with several names are there several times.

    Those inside of a subclass are `linear.parametrizations.weight.original0`, `...1` and so on, as `torch.export`
    calls them. They are the module's own tensors, not copies.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    live: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if is_traceable_wrapper_subclass(tensor):
            path, _, attribute = name.rpartition(".")
            prefix = f"{path}." if path else ""
            inner = enumerate(_inner(tensor))
            live.update((f"{prefix}parametrizations.{attribute}.original{i}", each) for i, each in inner)
        else:
            live[name] = tensor
    return live


def make_up(tensor: torch.Tensor) -> Hashable:
    """What a graph depends on of a subclass: its class, its settings, and the tensors inside; () for a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return ()
    settings = tensor.__tensor_flatten__()[1]
    inside = tuple((each.shape, each.stride(), each.dtype, each.device) for each in _inner(tensor))
    return type(tensor), repr(settings), inside


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors in `tensor`, in the order of `torch.export`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))
