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


def check_weights_stay(denoiser: torch.nn.Module) -> None:
    """Check that nothing moves or casts single layers' weights while the denoiser runs.

    Raises:
        ConfigurationError: something does.
    """
    for module in denoiser.modules():
        hook = _moving_hook(module, is_root=module is denoiser)
        if hook is not None:
            raise ConfigurationError(MSG_OFFLOADED.format(denoiser=type(denoiser).__name__, hook=hook))


def after_offload_hook(
    denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let `enable_model_cpu_offload`'s hook bring the whole denoiser to its device, as it does before each forward."""
    offload = getattr(denoiser, "_hf_hook", None)
    if offload is not None:
        args, kwargs = offload.pre_forward(denoiser, *args, **kwargs)
    return args, kwargs


def _moving_hook(module: torch.nn.Module, *, is_root: bool) -> str | None:
    """The name of a hook that moves or casts weights while the denoiser runs, None if there is none."""
    offload = getattr(module, "_hf_hook", None)
    if offload is not None and not (is_root and type(offload).__name__ in _WHOLE):
        return f"accelerate's {type(offload).__name__}"
    registry = getattr(module, "_diffusers_hook", None)
    others = [name for name in registry.hooks if name != HOOK_NAME] if registry is not None else []
    return f"diffusers' hook {others[0]!r}" if others else None
