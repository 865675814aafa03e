"""What was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import diffusers
import torch

from tgate_compile._version import __version__


def machine_of(device: torch.device) -> dict[str, str]:
    """Plain data: hardware and versions."""
    if device.type == "cuda":
        hardware = f"cuda ({torch.cuda.get_device_name(device)})"
    else:
        hardware = f"{device.type} ({processor()}, {torch.get_num_threads()} threads)"
    return {
        "device": hardware,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "tgate_compile": __version__,
    }


def processor() -> str:
    """Its name, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
