"""What runs a variant's graph: the interface, the eager backend, and the table of backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from tgate_compile._errors import FASTEST_ON_CPU, ConfigurationError, is_backend_installed
from tgate_compile.engine.trust import ChosenBackend
from tgate_compile.exports.inductor.live import InductorBackend
from tgate_compile.exports.onnx.live import OnnxRuntimeBackend
from tgate_compile.exports.openvino.live import OpenVinoBackend
from tgate_compile.exports.tensorrt.live import TensorRTBackend
from tgate_compile.passes.graphs import Variant

#: Runs a variant: (weights, inputs and caches) -> outputs and caches, all flat and in the variant's order. The
#: weights are passed in every call, so that a backend has no copy that could go stale.
Runner = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Backend(Protocol):
    """Makes runners."""

    name: ClassVar[str]
    #: Whether each graph has its own copy of the weights, in the order that its runtime wants.
    packs_weights: ClassVar[bool] = False
    #: Whether its results are PyTorch's own, so that there is nothing to compare them with.
    is_reference: ClassVar[bool]

    def __init__(self, options: Mapping[str, object]) -> None: ...

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options that the backend does not know."""

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        """The dtype that it computes in on `device` where that may round more than the values' own; else None."""
        ...

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        """A runner of `variant` for inputs and caches of the shapes, dtypes and devices of these.

        Raises:
            BackendError: the graph cannot be compiled.
        """
        ...


class EagerBackend:
    """Runs the graph's ATen operators one by one: no compile time, the plain pipeline's numbers to the bit."""

    name: ClassVar[str] = "eager"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        del options  # there are none

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        if options:
            raise ConfigurationError(f'backend "eager" has no options, but got {dict(options)!r}.')

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return None

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        graph_module = variant.program.graph_module

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            outputs: Sequence[torch.Tensor] = graph_module(*weights, *inputs)
            return outputs

        return run


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
    return [name for name in FASTEST_ON_CPU if is_backend_installed(name)]
