"""The weights of a denoiser: quantized, offloaded, and a fingerprint of all that a graph depends on."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.purity import foreign_code, has_global_hooks, settings_of, settings_of_classes


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by their names; those with several names are there several times.

    A tensor of a subclass is there as it is, and so are the tensors inside it, by the names that `torch.export` gives
    them: `linear.parametrizations.weight.original0`, `...1` and so on. They are the module's own, not copies.
    """
    return {**_named(module), **plain_tensors(module)}


def plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`live_tensors` without those of a subclass: each byte of the module is in a plain tensor here."""
    live: dict[str, torch.Tensor] = {}
    for name, tensor in _named(module).items():
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


def rounded_input(module: torch.nn.Module) -> str | None:
    """The name of the first parameter whose layer rounds its input to few bits as well, by torchao; None: none does."""
    for name, tensor in module.named_parameters():
        by_tensor = getattr(tensor, "act_quant_kwargs", None) is not None
        if by_tensor or type(tensor).__name__ == "LinearActivationQuantizedTensor":
            return name
    return None


def wrapped_weight(module: torch.nn.Module) -> str | None:
    """The name of the first parameter that is of a subclass with tensors inside it; None: none is."""
    return next((name for name, tensor in module.named_parameters() if is_traceable_wrapper_subclass(tensor)), None)


def check_quantization(module: torch.nn.Module) -> None:
    """Check that `torch.export` can follow what has quantized the module's layers, if anything has.

    Raises:
        UnsupportedModelError: it cannot.
    """
    model = type(module).__name__
    for name, layer in module.named_modules():
        if any(type(each).__module__.startswith("bitsandbytes") for each in layer.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{model} was quantized by bitsandbytes (its layer {name}, for example), whose weights keep state "
                "beside their numbers that torch.export cannot follow, so that there is no graph to optimize. What "
                "works: torchao's quantize_(model, Int8WeightOnlyConfig()), optimum-quanto's weights, or the model "
                "as it was."
            )
        if getattr(layer, "activation_qtype", None) is not None:
            raise UnsupportedModelError(
                f"{model} was quantized by optimum-quanto with its layers' inputs (activations=..., in {name}, for "
                "example), which torch.export cannot follow, so that there is no graph to optimize. What works: "
                "quantize(model, weights=...) alone, or torchao's Int8DynamicActivationInt8WeightConfig."
            )


def _named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors in `tensor`, in the order of `torch.export`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


HOOK_NAME = "tgate_compile"

#: Hooks of accelerate's kind that move the module as a whole before it runs: those of `enable_model_cpu_offload()`, and
#: of a `ComponentsManager` with `enable_auto_cpu_offload()`.
_WHOLE = frozenset({"CpuOffload", "CustomOffloadHook"})

MSG_OFFLOADED = (
    "{denoiser} is under {hook}, which moves or casts its weights layer by layer while it runs, so that no graph can "
    "hold them. Remove it (for offloading: pipe.remove_all_hooks(), then pipe.to(device)). "
    "enable_model_cpu_offload(), which moves the denoiser as a whole, works."
)
MSG_HOOKED = (
    "{denoiser} is under diffusers' hook {hook!r}, which decides anew in every step what is computed, so that no graph "
    "can hold it. Disable it first (disable_cache() for caches); tgate_compile has schedules of its own for that."
)

#: diffusers' hooks that move or cast weights, by the beginnings of their names.
_MOVING = ("group_offloading", "layerwise_casting", "lazy_prefetch", "peft_autocast_disable")
#: Those that skip or change computations, likewise.
_SKIPPING = (
    "faster_cache",
    "fbc_",
    "layer_skip",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "smoothed_energy_guidance",
    "taylorseer_cache",
    "text_kv_cache",
)


def check_weights_stay(denoiser: torch.nn.Module) -> None:
    """Check that no hook of accelerate's or diffusers' moves or casts weights, or skips layers, while it runs.

    Raises:
        ConfigurationError: one does.
    """
    for module in denoiser.modules():
        problem = _problem(type(denoiser).__name__, module, is_root=module is denoiser)
        if problem is not None:
            raise ConfigurationError(problem)


def after_offload_hook(
    denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let `enable_model_cpu_offload`'s hook bring the whole denoiser to its device, as it does before each forward."""
    offload = getattr(denoiser, "_hf_hook", None)
    if offload is not None:
        args, kwargs = offload.pre_forward(denoiser, *args, **kwargs)
    return args, kwargs


def _problem(denoiser: str, module: torch.nn.Module, *, is_root: bool) -> str | None:
    """What speaks against capturing `module` of the model `denoiser`; None if nothing does."""
    offload = getattr(module, "_hf_hook", None)
    if offload is not None and not (is_root and type(offload).__name__ in _WHOLE):
        return MSG_OFFLOADED.format(denoiser=denoiser, hook=f"accelerate's {type(offload).__name__}")
    registry = getattr(module, "_diffusers_hook", None)
    others = [] if registry is None else [(name, hook) for name, hook in registry.hooks.items() if name != HOOK_NAME]
    if not others:
        return None
    name, hook = others[0]
    if name.startswith(_MOVING):
        return MSG_OFFLOADED.format(denoiser=denoiser, hook=f"diffusers' hook {name!r}")
    if name.startswith(_SKIPPING):
        return MSG_HOOKED.format(denoiser=denoiser, hook=name)
    kind = f"{type(hook).__module__}.{type(hook).__qualname__}"
    return (
        f"{denoiser} is under the hook {name!r} of diffusers' hook registry ({kind}), whose Python code cannot be "
        f"part of a graph. Remove it first: module._diffusers_hook.remove_hook({name!r})."
    )


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
