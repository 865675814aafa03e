"""Write graphs as ONNX files, with the weights of all graphs in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._errors import BundleError, UnsupportedModelError, cause_of
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle import read_manifest
from tgate_compile.bundle.calibration import Quantizing
from tgate_compile.bundle.formats import Progress, Session, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph, inputs_of, size_of, symbols_of
from tgate_compile.bundle.quantization import Scheme
from tgate_compile.bundle.weights import WeightsFile, dtype_name
from tgate_compile.engine.backends import check_known_options
from tgate_compile.exports.onnx.convert import to_onnx
from tgate_compile.exports.onnx.live import OnnxRuntimeBackend
from tgate_compile.exports.onnx.open import OnnxSession, PiecewiseSession, check_onnx_file
from tgate_compile.exports.onnx.quantize import check_model, quantize_weights, save_model, save_static
from tgate_compile.passes.graphs import outputs_of, shape_of

if TYPE_CHECKING:
    import onnx_ir

#: The schemes whose operators support only float32.
FLOAT32_ONLY: tuple[Scheme, ...] = ("int8-dynamic", "int8-static")


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for any options of `export`: this format has none."""
    check_known_options('format="onnx"', "format_options", options, {})


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the backend `onnxruntime` does not know."""
    OnnxRuntimeBackend.check_options(options)


def runtime_version() -> str:
    """Return the version of the runtime in which the graphs are compared with PyTorch."""
    return f"onnxruntime {version('onnxruntime')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`, one after the other.

    Raises:
        BundleError: a graph cannot be converted, or ONNX's own checker rejects it.
    """
    return _write(graphs, folder, None, progress)


def write_quantized(
    graphs: Sequence[PlannedGraph],
    folder: Path,
    options: Mapping[str, object],
    quantizing: Quantizing,
    progress: Progress,
) -> dict[str, WrittenGraph]:
    """Write `graphs` as `write_graphs` does, with those quantized that `quantizing` selects.

    Raises:
        BundleError: as `write_graphs`.
        UnsupportedModelError: ONNX does not have the operators for the denoiser's dtype.
    """
    dtypes = {value.dtype for planned in graphs for value in planned.example_inputs if value.is_floating_point()}
    scheme = quantizing.quantization.scheme
    if scheme in FLOAT32_ONLY and dtypes != {torch.float32}:
        given = ", ".join(sorted(map(dtype_name, dtypes)))
        raise UnsupportedModelError(
            f'quantize="{scheme}" computes with integers, which ONNX supports only in float32 models, but this '
            f'denoiser is in {given}. Export it in float32, or with quantize="int8".'
        )
    return _write(graphs, folder, quantizing, progress)


def _write(
    graphs: Sequence[PlannedGraph], folder: Path, quantizing: Quantizing | None, progress: Progress
) -> dict[str, WrittenGraph]:
    (folder / m.GRAPHS_FOLDER).mkdir()
    written = {}
    with (folder / m.WEIGHTS_FILE).open("xb") as file:
        weights = WeightsFile(file)
        for planned in graphs:
            progress(f"Converting the {planned.name} graph")
            path = f"{m.GRAPHS_FOLDER}/{planned.name}.onnx"
            quantized = quantizing is not None and quantizing.takes(planned)
            nodes = write_graph(planned, folder / path, weights, quantizing if quantized else None)
            written[planned.name] = WrittenGraph(path, nodes, quantized=quantized)
    for name, graph in written.items():
        check_model(name, folder / graph.file)
    return written


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Raise BundleError unless the file of `graph` in the bundle at `root` is valid; its weights are not read."""
    inputs, outputs = read_manifest.inputs_of(graph), read_manifest.outputs_of(graph)
    check_onnx_file(root / graph.file, inputs, outputs, manifest.files[m.WEIGHTS_FILE].size)


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
    """Open the graph in ONNX Runtime, or raise BackendError."""
    if options.get("frugal") and device.type == "cpu":
        return PiecewiseSession(graph, root / graph.file)
    return OnnxSession(graph, root / graph.file, device, options)


def write_graph(planned: PlannedGraph, path: Path, weights: WeightsFile, quantizing: Quantizing | None = None) -> int:
    """Write the graph to `path`, add its weights to `weights`, and return the number of its operators.

    Raises:
        BundleError: the graph cannot be converted.
    """

    try:
        graph = to_onnx(planned.variant)
    except Exception as error:  # torch.onnx raises whatever its converters raise
        raise BundleError(f"The {planned.name} graph cannot be converted to ONNX: {cause_of(error)}.") from error
    model = graph.model
    for value, name in zip(model.graph.inputs, planned.input_names, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, planned.output_names, strict=True):
        value.name = name
    model.graph.name = planned.name
    _name_sizes(model, planned)
    live = dict(zip(planned.variant.weights, planned.weights, strict=True))
    used = {name: live[name] for name in graph.weights}
    if quantizing is None:
        save_model(model, path, used, weights)
    elif quantizing.calibration is None:
        save_model(model, path, quantize_weights(model, used, quantizing.quantization, weights), weights)
    else:
        inputs = quantizing.calibration.inputs_of(planned)
        return save_static(model, used, inputs, quantizing, path, weights)
    return sum(1 for _ in model.graph.all_nodes())


def _name_sizes(model: onnx_ir.Model, planned: PlannedGraph) -> None:
    """Name the free sizes in the shapes of inputs and outputs as in the manifest."""
    import onnx_ir

    symbols = symbols_of(planned)
    program = planned.variant.program
    for values, nodes in (
        (model.graph.inputs, inputs_of(planned)),
        (model.graph.outputs, outputs_of(program.graph)),
    ):
        for value, node in zip(values, nodes, strict=True):
            value.shape = onnx_ir.Shape([size_of(size, symbols) for size in shape_of(node)])
