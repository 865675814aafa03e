"""Notice that a denoiser is no longer the one that was captured."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin

from tgate_compile._live_tensors import make_up
from tgate_compile._purity import foreign_code, has_global_hooks, settings_of, settings_of_classes

# Bookkeeping of torch and of the hook mechanism, which no graph depends on.
_IGNORED = frozenset(vars(torch.nn.Module())) - {"training", "_forward_hooks", "_forward_pre_hooks"} | {
    "_diffusers_hook",
    "_internal_dict",  # diffusers' configuration, of which the denoiser's own is looked at
    "forward",
}
# On the whole denoiser: what diffusers notes when it has fused LoRAs into its weights, and then unloaded them; and its
# hooks, which stay outside of the graph.
_NOTES = _IGNORED | {"_hf_peft_config_loaded", "_safe_fusing", "lora_scale", "_forward_hooks", "_forward_pre_hooks"}
# Of UNet blocks: diffusers' disable_freeu() leaves them at None, and its code asks by getattr(block, "s1", None).
_FREEU = frozenset({"s1", "s2", "b1", "b2"})
_SCALARS = frozenset({bool, int, float, str, type(None)})
#: How far to look into containers and objects: a list in a list in a processor's attribute.
_DEPTH = 5
#: Up to so many numbers of a tensor or an array are compared themselves.
_FEW = 64


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
    config = dict(getattr(denoiser, "config", {})) if isinstance(denoiser, ConfigMixin) else {}
    named = tuple((name, _plain(value, _DEPTH)) for name, value in config.items() if not name.startswith("_"))
    # Attention is often replaced here, for all models (SageAttention, Flash Attention).
    attention = torch.nn.functional.scaled_dot_product_attention
    return modules, tensors, foreign, settings_of_classes(denoiser), has_global_hooks(), named, attention


def _attributes(module: torch.nn.Module, ignored: frozenset[str]) -> Hashable:
    # Written for speed: a large denoiser has two thousand modules, and this runs once per image.
    return tuple(
        (name, value if type(value) in _SCALARS else _plain(value, _DEPTH))
        for name, value in module.__dict__.items()
        if name not in ignored and not (value is None and name in _FREEU)
    )


def _plain(value: Any, depth: int) -> Hashable:
    """`value` in a form that can be compared: numbers and strings themselves, objects by type and attributes."""
    if type(value) in _SCALARS or isinstance(value, (torch.dtype, torch.device, FunctionType, BuiltinFunctionType)):
        return value  # type: ignore[no-any-return]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _numbers(value)
    if depth == 0 or isinstance(value, torch.nn.Module):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (int, float, complex, str, bytes)):
        return type(value), repr(value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item, depth - 1)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(item, depth - 1) for item in value)
    if isinstance(value, functools.partial):
        return tuple(_plain(part, depth - 1) for part in (value.func, value.args, value.keywords))
    if isinstance(value, MethodType):
        return value.__func__, id(value.__self__)
    return type(value), _plain(getattr(value, "__dict__", {}), depth - 1)


def _numbers(value: torch.Tensor | np.ndarray | np.generic) -> Hashable:
    """A tensor or array that is not a parameter or buffer: by its values if these are few, else by its identity."""
    if isinstance(value, np.generic):
        return value.item()  # type: ignore[no-any-return]  # as NumPy's ranges and random numbers come
    kind = type(value), str(value.dtype), tuple(value.shape)
    if isinstance(value, np.ndarray):
        return (*kind, value.tobytes() if value.dtype != object else id(value))
    if type(value) is torch.Tensor and value.numel() <= _FEW and value.device.type != "meta":
        return (*kind, repr(value.tolist()))
    return (*kind, id(value), None if value.is_inference() else value._version)
