"""Write graphs as methods of one ExecuTorch program with their weights, for phones and other edge devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from tgate_compile._errors import BackendError, BundleError, ConfigurationError, UnsupportedModelError, first_line
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.calibration import Quantizing
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.read_manifest import inputs_of, outputs_of
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.engine.backends import check_known_options, one_of
from tgate_compile.exports.executorch.convert import Integers, to_executorch
from tgate_compile.exports.executorch.open import ExecuTorchSession, open_program

PROGRAM_FILE = "graphs/graphs.pte"

#: The choices for `delegate`: XNNPACK, or ExecuTorch's own portable kernels.
DELEGATES = ("xnnpack", "portable")

#: ExecuTorch's numbers for those dtypes that a manifest supports.
_DTYPES: Mapping[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options of `export` that are not valid."""
    check_known_options('format="executorch"', "format_options", options, {"delegate": one_of(DELEGATES)})


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for any options of `load`: this format has none."""
    note = "It uses as many threads as ExecuTorch finds cores."
    check_known_options('backend="executorch"', "backend_options", options, {}, note)


def runtime_version() -> str:
    """Return the version of ExecuTorch."""
    return f"executorch {version('executorch')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`, as methods of one program.

    Raises:
        ConfigurationError: the denoiser is not on the CPU.
        BundleError: a graph cannot be converted.
    """
    return _write(graphs, folder, options, {}, progress)


def write_quantized(
    graphs: Sequence[PlannedGraph],
    folder: Path,
    options: Mapping[str, object],
    quantizing: Quantizing,
    progress: Progress,
) -> dict[str, WrittenGraph]:
    """Write `graphs` as `write_graphs` does, with those quantized that `quantizing` selects.

    Raises:
        ConfigurationError: as `write_graphs`, or the delegate is not XNNPACK.
        UnsupportedModelError: the denoiser is not in float32.
        BundleError: as `write_graphs`.
    """
    if options.get("delegate", DELEGATES[0]) != DELEGATES[0]:
        raise ConfigurationError(
            f'quantize="{quantizing.quantization.scheme}" needs XNNPACK, but format_options["delegate"] is "portable". '
            "Leave out one of the two."
        )
    dtypes = {value.dtype for planned in graphs for value in planned.example_inputs if value.is_floating_point()}
    if dtypes != {torch.float32}:
        given = ", ".join(sorted(map(dtype_name, dtypes)))
        raise UnsupportedModelError(
            f'quantize="{quantizing.quantization.scheme}" needs a float32 model, but this denoiser is in {given}: '
            "ExecuTorch can mix XNNPACK's integer operators only with float32. Export it in float32."
        )
    calibration = quantizing.calibration
    integers = {
        planned.name: Integers(quantizing.quantization, calibration.inputs_of(planned) if calibration else ())
        for planned in graphs
        if quantizing.takes(planned)
    }
    return _write(graphs, folder, options, integers, progress)


def _write(
    graphs: Sequence[PlannedGraph],
    folder: Path,
    options: Mapping[str, object],
    integers: Mapping[str, Integers],
    progress: Progress,
) -> dict[str, WrittenGraph]:
    device = graphs[0].example_inputs[0].device
    if device.type != "cpu":
        raise ConfigurationError(
            f'format="executorch" needs a pipeline on the CPU, but the denoiser is on "{device}". Call '
            'pipe.to("cpu") first.'
        )
    (folder / m.GRAPHS_FOLDER).mkdir()
    names = ", ".join(planned.name for planned in graphs)
    progress(f"Converting the graphs {names}")
    try:
        delegate = str(options.get("delegate", DELEGATES[0]))
        program = to_executorch({planned.name: planned.variant for planned in graphs}, delegate, integers)
    except Exception as error:  # ExecuTorch's errors have no common base class
        problem = first_line(error, named=True)
        raise BundleError(
            f"The graphs {names} cannot be converted to ExecuTorch: {problem}. Nothing has been written."
        ) from error
    with (folder / PROGRAM_FILE).open("xb") as file:
        program.manager.write_to_file(file)
    return {
        name: WrittenGraph(PROGRAM_FILE, program.count(name), entry=name, quantized=name in integers)
        for name in program.operators
    }


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Compare the metadata of the method for `graph` in the bundle at `root` with the manifest, without running it.

    Raises:
        BundleError: the program does not agree with the manifest.
    """
    entries = {each.entry for each in manifest.graphs.values()}
    files = {each.file for each in manifest.graphs.values()}
    if entries != set(manifest.graphs) or files != {PROGRAM_FILE} or manifest.weights is not None:
        raise BundleError(
            f"The graphs of the bundle {root} must be methods of {PROGRAM_FILE} with their own names, with their "
            "weights inside."
        )
    path = root / PROGRAM_FILE
    try:
        program = open_program(path)
    except BackendError as error:
        raise BundleError(str(error)) from error
    if program.method_names != entries:
        given, expected = (", ".join(sorted(map(str, names))) for names in (program.method_names, entries))
        raise BundleError(f"The program {path} has the methods {given}, but the manifest says {expected}.")
    assert graph.entry is not None
    method = program.metadata(graph.entry)
    for what, count, info, specs in (
        ("inputs", method.num_inputs(), method.input_tensor_meta, inputs_of(graph)),
        ("outputs", method.num_outputs(), method.output_tensor_meta, outputs_of(graph)),
    ):
        given = ", ".join(_shown(info(position)) for position in range(count))
        expected = ", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in specs)
        if given != expected:
            raise BundleError(
                f"The method {graph.entry} of {path} has the {what} {given}, but the manifest says {expected}."
            )


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> ExecuTorchSession:
    """Open the graph in ExecuTorch's runtime, or raise BackendError."""
    return ExecuTorchSession(graph, root, device)


def _shown(tensor: object) -> str:
    dtype = _DTYPES.get(tensor.dtype())  # type: ignore[attr-defined]
    return f"{'an unsupported dtype' if dtype is None else dtype_name(dtype)}{list(tensor.sizes())}"  # type: ignore[attr-defined]
