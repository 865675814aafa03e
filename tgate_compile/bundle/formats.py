"""The formats of bundles: what a format's module must provide, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from tgate_compile._errors import BackendError, check_installed
from tgate_compile.bundle.manifest import CacheOutput, Graph, TensorSpec
from tgate_compile.bundle.quantization import Scheme
from tgate_compile.bundle.read_manifest import shape_at, solve

if TYPE_CHECKING:
    from tgate_compile.bundle.calibration import Quantizing
    from tgate_compile.bundle.manifest import Manifest
    from tgate_compile.bundle.plan import PlannedGraph


class Session(Protocol):
    """Runs one graph."""

    @property
    def provider(self) -> str:
        """What runs it, for a person: `CPUExecutionProvider`."""
        ...

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last.

        Raises:
            BackendError: the runtime fails.
        """
        ...


@runtime_checkable
class Refittable(Protocol):
    """A session whose graph can be given other weights."""

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these weights, by their names in the denoiser; those that are missing are the bundle's.

        Raises:
            BackendError: the graph cannot follow.
        """


def inputs_of(graph: Graph) -> list[TensorSpec]:
    """All inputs, caches last."""
    return [*graph.inputs, *graph.cache_inputs]


def outputs_of(graph: Graph) -> list[TensorSpec | CacheOutput]:
    """All outputs, caches last."""
    return [*graph.outputs, *graph.cache_outputs]


def sizes_for(graph: Graph, inputs: Sequence[torch.Tensor]) -> Mapping[str, int] | None:
    """The free sizes of `graph` for `inputs`, caches left out or not; None if they are of no shape that it takes."""
    specs = inputs_of(graph)[: len(inputs)]
    return solve([spec.shape for spec in specs], [tuple(tensor.shape) for tensor in inputs])


def output_shapes(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of all outputs for inputs of the right shapes."""
    sizes = sizes_for(graph, inputs)
    assert sizes is not None, "the store has checked the call"
    return [shape_at(spec.shape, sizes) for spec in outputs_of(graph)]


#: Told what is being done, one line a stage.
Progress = Callable[[str], None]

MSG_NO_GPU = (
    'A bundle of format "{format}" runs on an NVIDIA GPU, and PyTorch {torch} finds none here: there is no GPU, no '
    "driver, or no CUDA in this PyTorch. On this machine, load a bundle of another format."
)
MSG_NOT_ON_GPU = (
    'A bundle of format "{format}" runs on an NVIDIA GPU, and the pipeline is on "{device}". Call pipe.to("cuda") '
    "first."
)


@dataclass(frozen=True)
class WrittenGraph:
    """A graph that has been written.

    Attributes:
        file: relative to the bundle.
        nodes: the number of its operators.
        entry: what it is called in a file of several.
        checked_on: the device that runs it to compare it with PyTorch's graph; None: this machine has none.
        limits: the least and the most of each free size that it takes, if that is less than what the graph takes.
        quantized: it is not as close to PyTorch's as rounding permits, and cannot be.
    """

    file: str
    nodes: int
    entry: str | None = None
    checked_on: str | None = "cpu"
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quantized: bool = False


class GraphFormat(Protocol):
    """Writes graphs, checks what was written, and opens it again. A module has this as functions."""

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `export` that the format does not know."""

    def check_load_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `load` that the format does not know."""

    def runtime_version(self) -> str:
        """What made the graphs, for the manifest: `onnxruntime 1.31.1`."""
        ...

    def write_graphs(
        self, graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
    ) -> dict[str, WrittenGraph]:
        """Write `graphs` to the bundle at `folder`; tell where each is, by its name.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...

    def check_graph(self, graph: Graph, root: Path, manifest: Manifest) -> None:
        """Look at a file of the bundle `root`, read from wherever, with suspicion.

        Raises:
            BundleError: it is not what `graph` says.
        """

    def open_graph(self, graph: Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
        """The graph of the bundle at `root`, ready to run.

        Raises:
            BackendError: the runtime does not take it.
        """
        ...


class QuantizingFormat(GraphFormat, Protocol):
    """A format whose row has schemes."""

    def write_quantized(
        self,
        graphs: Sequence[PlannedGraph],
        folder: Path,
        options: Mapping[str, object],
        quantizing: Quantizing,
        progress: Progress,
    ) -> dict[str, WrittenGraph]:
        """What `write_graphs` does, for graphs of which those are `quantized` that `quantizing` says.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...


@dataclass(frozen=True)
class Row:
    """What is said of a format before any of its packages is imported.

    Attributes:
        module: has the functions of `GraphFormat`; `module:name` is an object in a module that has them.
        backend: what `load` runs it with.
        extra: of tgate_compile, with the packages that it needs.
        to_write: modules that `export` needs.
        to_load: modules that `load` needs.
        needs_gpu: its graphs run on NVIDIA's GPUs only.
        fixed_sizes: its graphs leave no size to each call.
        also: other backends that `load` may be told, with the format whose functions open its graphs in them.
        quantized_weights: it takes weights that torchao has quantized.
        schemes: of quantization, that it takes; with any, the module is a `QuantizingFormat`.
    """

    module: str
    backend: str
    extra: str
    to_write: tuple[str, ...]
    to_load: tuple[str, ...]
    needs_gpu: bool = False
    fixed_sizes: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    quantized_weights: bool = True
    schemes: tuple[Scheme, ...] = ()


FORMATS: Mapping[str, Row] = {
    "onnx": Row(
        "tgate_compile.exports.onnx.save",
        backend="onnxruntime",
        extra="onnx",
        to_write=("onnx", "onnxscript", "onnxruntime", "pydantic"),
        to_load=("onnx", "pydantic"),
        also={"openvino": "openvino"},
        schemes=("int8", "int4", "int8-dynamic", "int8-static"),
    ),
    "tensorrt-rtx": Row(
        "tgate_compile.exports.tensorrt.save:RTX",
        backend="tensorrt-rtx",
        extra="tensorrt-rtx",
        to_write=("onnx", "onnxscript", "tensorrt_rtx", "pydantic"),
        to_load=("onnx", "tensorrt_rtx", "pydantic"),
        needs_gpu=True,
    ),
    "tensorrt": Row(
        "tgate_compile.exports.tensorrt.save:ENTERPRISE",
        backend="tensorrt",
        extra="tensorrt",
        to_write=("onnx", "onnxscript", "tensorrt", "pydantic"),
        to_load=("onnx", "tensorrt", "pydantic"),
        needs_gpu=True,
    ),
    "openvino": Row(
        "tgate_compile.exports.openvino.save",
        backend="openvino",
        extra="openvino",
        to_write=("onnx", "onnxscript", "openvino", "pydantic"),
        to_load=("openvino", "pydantic"),
        schemes=("int8", "int4", "int8-dynamic", "int8-static"),
    ),
    "aoti": Row(
        "tgate_compile.exports.inductor.save",
        backend="aoti",
        extra="aoti",
        to_write=("pydantic",),
        to_load=("pydantic",),
    ),
    "executorch": Row(
        "tgate_compile.exports.executorch.save",
        backend="executorch",
        extra="executorch",
        to_write=("executorch", "pydantic"),
        to_load=("executorch", "pydantic"),
        fixed_sizes=True,
        quantized_weights=False,
        schemes=("int8-dynamic", "int8-static"),
    ),
    "coreml": Row(
        "tgate_compile.exports.coreml.save",
        backend="coreml",
        extra="coreml",
        to_write=("coremltools", "pydantic"),
        to_load=("coremltools", "pydantic"),
        fixed_sizes=True,
    ),
}


def format_called(name: str) -> GraphFormat:
    """The format's functions; its packages must be there."""
    module, _, attribute = FORMATS[name].module.partition(":")
    found = importlib.import_module(module)
    functions: GraphFormat = getattr(found, attribute) if attribute else found
    return functions


def openers(name: str) -> dict[str, str]:
    """The backends that run graphs of the format `name`, its own first, with the format whose functions open them."""
    row = FORMATS[name]
    return {row.backend: name, **row.also}


def check_can_write(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `export` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_write, extra=row.extra, what=f'format="{name}"')


def check_can_load(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `load` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_load, extra=row.extra, what=f'A bundle of format "{name}"')


def check_can_run(name: str, device: torch.device) -> None:
    """Raise BackendError, which says what is missing, unless graphs of this format run here, for inputs on `device`."""
    if not FORMATS[name].needs_gpu:
        return
    import torch  # not above: the command line reads the table for its help

    if not torch.cuda.is_available():
        raise BackendError(MSG_NO_GPU.format(format=name, torch=torch.__version__))
    if device.type != "cuda":
        raise BackendError(MSG_NOT_ON_GPU.format(format=name, device=device))
