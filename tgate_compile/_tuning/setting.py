"""What was measured on: classes, device, number format, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import diffusers
import torch
from diffusers import DiffusionPipeline

from tgate_compile._version import __version__


def setting_of(pipe: DiffusionPipeline, denoisers: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Plain data for results."""
    weights = (tensor for denoiser in denoisers.values() for tensor in denoiser.parameters())
    weight = next((tensor for tensor in weights if tensor.is_floating_point()), None)
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": ", ".join(type(denoiser).__name__ for denoiser in denoisers.values()),
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(weight.device if weight is not None else "cpu"),
        "dtype": str(weight.dtype if weight is not None else torch.float32).removeprefix("torch."),
        "tgate_compile": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
