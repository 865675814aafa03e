"""The device and the number format to run with: the best ones here, or those asked for."""

from __future__ import annotations

import torch

from tgate_compile._cli.families import gpu_dtype
from tgate_compile._cli.options import Dtype
from tgate_compile._errors import ConfigurationError

DTYPES = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}

MSG_DEVICE = "The device must be auto, cpu, cuda, cuda:<number> or mps, but got {given!r}."
MSG_NO_DEVICE = "There is no {given} device here that torch {version} can use. Use --device cpu, or leave it out."


def choose_device(given: str) -> torch.device:
    """The device called `given`; `auto` is the best one here.

    Raises:
        ConfigurationError: there is no such device.
    """
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if given == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if usable[name]))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigurationError(MSG_DEVICE.format(given=given)) from None
    if device.type not in usable:
        raise ConfigurationError(MSG_DEVICE.format(given=given))
    is_missing_gpu = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not usable[device.type] or is_missing_gpu:
        raise ConfigurationError(MSG_NO_DEVICE.format(given=given, version=torch.__version__))
    return device


def choose_dtype(given: Dtype, pipeline_class: str, device: torch.device) -> Dtype:
    """The number format asked for, or the best one for a pipeline of this class on `device`."""
    if given is not Dtype.auto:
        return given
    if device.type == "cpu":
        return Dtype.fp32
    chosen = Dtype(gpu_dtype(pipeline_class))
    if chosen is Dtype.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return Dtype.fp16
    return chosen
