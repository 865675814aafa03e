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
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": ", ".join(type(denoiser).__name__ for denoiser in denoisers.values()),
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        "dtype": str(next(iter(denoisers.values())).dtype).removeprefix("torch."),
        "tgate_compile": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
