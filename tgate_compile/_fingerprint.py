"""Notice that a denoiser is no longer the one that was captured."""

from __future__ import annotations

from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from tgate_compile._live_tensors import make_up
from tgate_compile._purity import foreign_code, has_global_hooks, settings_of, settings_of_classes

# Bookkeeping of torch and of the hook mechanism, which no graph depends on.
_IGNORED = frozenset(vars(torch.nn.Module())) - {"training", "_forward_hooks", "_forward_pre_hooks"} | {
    "_diffusers_hook",
    "_internal_dict",  # diffusers' configuration: what the module was made from, not what it does
    "forward",
}
# On the whole denoiser: what diffusers notes when it has fused LoRAs into its weights, and then unloaded them; and its
# hooks, which stay outside of the graph.
_NOTES = _IGNORED | {"_hf_peft_config_loaded", "_safe_fusing", "lora_scale", "_forward_hooks", "_forward_pre_hooks"}
# Of UNet blocks: diffusers' disable_freeu() leaves them at None, and its code asks by getattr(block, "s1", None).
_FREEU = frozenset({"s1", "s2", "b1", "b2"})
_SCALARS = frozenset({bool, int, float, str, type(None)})


def fingerprint(denoiser: torch.nn.Module) -> Hashable:
    """What a captured graph bakes in: equal fingerprints mean that graph and compiled code still hold.

    Covered: the modules and their plain attributes (LoRA scales and active adapters, FreeU's factors, attention
    processors with theirs), hooks inside of it, plain values that code of others reads, and each parameter's shape,
    strides, dtype, device and quantization. The parameters' *values* are not: graphs read them live, so changing
    weights in place needs no new capture.
    """
    modules = tuple(
        (
            name,
            type(module),
            _attributes(module, _IGNORED if name else _NOTES),
            bool(name) and "forward" in module.__dict__,
        )
        for name, module in denoiser.named_modules()
    )
    tensors = tuple(
        (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, make_up(tensor))
        for named in (denoiser.named_parameters(), denoiser.named_buffers())
        for name, tensor in named
    )
    foreign = tuple((code.path, code.kind, settings_of(code.code)) for code in foreign_code(denoiser))
    return modules, tensors, foreign, settings_of_classes(denoiser), has_global_hooks()


def _attributes(module: torch.nn.Module, ignored: frozenset[str]) -> Hashable:
    # Written for speed: a large denoiser has two thousand modules, and this runs once per image.
    return tuple(
        (name, value if type(value) in _SCALARS else _plain(value, 3))
        for name, value in module.__dict__.items()
        if name not in ignored and not (value is None and name in _FREEU)
    )


def _plain(value: Any, depth: int) -> Hashable:
    """`value` in a form that can be compared: numbers and strings themselves, objects by type and attributes."""
    if type(value) in _SCALARS or isinstance(value, (torch.dtype, torch.device)):
        return value  # type: ignore[no-any-return]
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module)):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, dict):
        return tuple((str(key), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(item, depth - 1) for item in value)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value  # itself, not its id, which a later function may get
    return type(value), _plain(getattr(value, "__dict__", {}), depth - 1)
