"""Hooks of other libraries on a denoiser: which of them a captured graph can live with."""

from __future__ import annotations

from typing import Any

import torch

from tgate_compile._errors import ConfigurationError

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
MSG_UNKNOWN_HOOK = (
    "{denoiser} is under the hook {hook!r} of diffusers' hook registry ({kind}), whose Python code cannot be part of a "
    "graph. Remove it first: module._diffusers_hook.remove_hook({hook!r})."
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
    return MSG_UNKNOWN_HOOK.format(denoiser=denoiser, hook=name, kind=kind)
