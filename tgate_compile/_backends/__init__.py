"""Backends: what runs a variant's graph. A new one is a module with a `Backend`, and a row here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tgate_compile._backends._interface import Backend, Runner
from tgate_compile._backends.chosen import ChosenBackend
from tgate_compile._backends.eager import EagerBackend
from tgate_compile._backends.inductor import InductorBackend
from tgate_compile._backends.onnx_runtime import OnnxRuntimeBackend
from tgate_compile._backends.open_vino import OpenVinoBackend
from tgate_compile._backends.torch_tensorrt_compiler import TensorRTBackend
from tgate_compile._errors import ConfigurationError
from tgate_compile._installed import is_installed

__all__ = ["BACKENDS", "Backend", "ChosenBackend", "Runner", "check_backend", "make_backend"]

BACKENDS: Mapping[str, type[Backend]] = {
    "inductor": InductorBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "openvino": OpenVinoBackend,
    "tensorrt": TensorRTBackend,
    "eager": EagerBackend,
}


#: What runs graphs that `export` has built, by the format, and nothing else.
FOR_BUNDLES = ("aoti", "tensorrt-rtx", "executorch", "coreml")

MSG_FOR_BUNDLES = (
    'backend="{name}" runs graphs that are built beforehand: export(pipe, folder, format="{name}") of a pipeline that '
    'is optimized with another backend, such as "eager", then load(pipe, folder) into a plain one.'
)


def check_backend(name: object, options: Mapping[str, object]) -> None:
    """Raise ConfigurationError unless `name` is a backend, or `auto`, that takes `options`."""
    if name == "auto":
        if options:
            raise ConfigurationError('backend_options need a named backend, but backend is "auto".')
        return
    if name in FOR_BUNDLES:
        raise ConfigurationError(MSG_FOR_BUNDLES.format(name=name))
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(f'"{known}"' for known in BACKENDS)
        raise ConfigurationError(f'backend must be one of {known} or "auto", but got {name!r}.')
    BACKENDS[name].check_options(options)


def make_backend(name: str, options: Mapping[str, object], device: torch.device) -> ChosenBackend:
    """The backend called `name`; for `auto` those that can serve `device`'s type, the fastest first."""
    names = _automatic(device) if name == "auto" else [name]
    return ChosenBackend([BACKENDS[name](options) for name in names])


def _automatic(device: torch.device) -> list[str]:
    """What is installed, in the order in which it was measured. benchmarks/README.md has the figures.

    Inductor compiles for minutes on a CPU, and ends up beside eager.
    """
    if device.type != "cpu":
        return ["inductor", "eager"]
    installed = [backend.name for backend in (OpenVinoBackend, OnnxRuntimeBackend) if is_installed(*backend.needs)]
    return [*installed, "eager"]
