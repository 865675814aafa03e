"""Notice that a denoiser is no longer the one that was captured."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

# Bookkeeping of torch and of the hook mechanism, which no graph depends on.
_IGNORED = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_internal_dict",
        "_diffusers_hook",
        "forward",
    }
)


def fingerprint(denoiser: torch.nn.Module) -> Hashable:
    """What a captured graph bakes in: equal fingerprints mean that graph and compiled code still hold.

    Covered: the modules and their plain attributes (LoRA scales and active adapters, FreeU's factors, attention
    processors with theirs), hooks, and each parameter's shape, strides, dtype and device. The parameters' *values*
    are not: graphs read them live, so changing weights in place needs no new capture.
    """
    modules = tuple(
        (name, type(module), _plain(_attributes(module), 3), name and "forward" in vars(module))
        for name, module in denoiser.named_modules()
    )
    tensors = tuple(
        (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for named in (denoiser.named_parameters(), denoiser.named_buffers())
        for name, tensor in named
    )
    return modules, tensors


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _IGNORED}


def _plain(value: Any, depth: int) -> Hashable:
    """`value` in a form that can be compared: numbers and strings themselves, objects by type and attributes."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module)):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(item, depth - 1) for item in value)
    if callable(value) and not hasattr(value, "__dict__"):
        return id(value)
    return type(value), _plain(getattr(value, "__dict__", {}), depth - 1)
