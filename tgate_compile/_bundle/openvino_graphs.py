"""Graphs as OpenVINO's own files, made of the ONNX files, with the weights of all of them in one file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from tgate_compile._backends.openvino_model import check_options as check_backend_options
from tgate_compile._backends.openvino_package import core, openvino
from tgate_compile._bundle import manifest as m
from tgate_compile._bundle import onnx_graphs
from tgate_compile._bundle.formats import Progress, WrittenGraph
from tgate_compile._bundle.openvino_ir import check_ir, share_constants
from tgate_compile._bundle.openvino_session import OpenVinoSession
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.quantizing import Quantizing
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._errors import BundleError, ConfigurationError

#: Where the ONNX files are while they are converted, and constants before they are shared.
_SCRATCH = "scratch"

MSG_NO_OPTIONS = 'format="openvino" has no options, but got {given}.'
MSG_NOT_CONVERTED = "OpenVINO does not take the {graph} graph: {problem}. Nothing has been written."


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError: there are none."""
    if options:
        raise ConfigurationError(MSG_NO_OPTIONS.format(given=", ".join(map(repr, options))))


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the backend of the same name does not know."""
    check_backend_options(options)


def runtime_version() -> str:
    """What converted the graphs, and ran them to compare them with PyTorch."""
    return f"openvino {version('openvino')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`.

    Raises:
        BundleError: a graph cannot be converted.
    """
    scratch = folder / _SCRATCH
    scratch.mkdir()
    models = onnx_graphs.write_graphs(graphs, scratch, {}, progress)
    return _converted(models, scratch, folder, progress)


def write_quantized(
    graphs: Sequence[PlannedGraph],
    folder: Path,
    options: Mapping[str, object],
    quantizing: Quantizing,
    progress: Progress,
) -> dict[str, WrittenGraph]:
    """Write `graphs` as `write_graphs` does, quantized as ONNX graphs are: OpenVINO takes their integers over.

    Raises:
        BundleError: as `write_graphs`.
    """
    scratch = folder / _SCRATCH
    scratch.mkdir()
    models = onnx_graphs.write_quantized(graphs, scratch, {}, quantizing, progress)
    return _converted(models, scratch, folder, progress)


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Check the file of `graph` in the bundle `root`, without its weights; raise BundleError."""
    inputs, outputs = [*graph.inputs, *graph.cache_inputs], [*graph.outputs, *graph.cache_outputs]
    check_ir(root / graph.file, inputs, outputs, manifest.files[m.WEIGHTS_FILE].size)


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> OpenVinoSession:
    """The graph in OpenVINO; raise BackendError."""
    return OpenVinoSession(graph, root, device, options)


def _converted(
    models: Mapping[str, WrittenGraph], scratch: Path, folder: Path, progress: Progress
) -> dict[str, WrittenGraph]:
    """The ONNX files in `scratch` as OpenVINO's in `folder`; `scratch` is gone then."""
    (folder / m.GRAPHS_FOLDER).mkdir()
    constants = scratch / "constants.bin"
    written = {}
    with (folder / m.WEIGHTS_FILE).open("xb") as file:
        weights = WeightsFile(file)
        for name, model in models.items():
            progress(f"Converting the {name} graph for OpenVINO")
            path = f"{m.GRAPHS_FOLDER}/{name}.xml"
            try:
                openvino().serialize(core().read_model(scratch / model.file), folder / path, constants)
            except Exception as error:  # openvino's errors are RuntimeErrors, or of classes of their own
                problem = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                raise BundleError(MSG_NOT_CONVERTED.format(graph=name, problem=problem)) from error
            nodes = share_constants(folder / path, constants, weights)
            written[name] = replace(model, file=path, nodes=nodes)
    shutil.rmtree(scratch)
    return written
