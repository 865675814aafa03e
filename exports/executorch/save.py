"""Graphs as methods of one ExecuTorch program, for phones and other devices, with the weights of all of them inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from tgate_compile._arguments import check_names
from tgate_compile._errors import BackendError, BundleError, ConfigurationError, UnsupportedModelError
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.calibration import Quantizing
from tgate_compile.bundle.formats import Progress, WrittenGraph, inputs_of, outputs_of
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.exports.executorch.convert import to_executorch
from tgate_compile.exports.executorch.open import ExecuTorchSession, open_program
from tgate_compile.exports.executorch.quantize import Integers

PROGRAM_FILE = "graphs/graphs.pte"

#: What runs the graphs' pieces: XNNPACK, or ExecuTorch's own portable kernels.
DELEGATES = ("xnnpack", "portable")

#: Those of ExecuTorch's numbers for dtypes that a manifest has names for.
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

MSG_DELEGATE = 'format_options["delegate"] must be {expected}, but got {given!r}.'
MSG_NO_LOAD_OPTIONS = (
    'A bundle of format "executorch" has no backend_options, but got {given}. It runs on as many threads as '
    "ExecuTorch finds cores for."
)
MSG_ON_CPU = (
    'format="executorch" is written from a pipeline on the CPU, and the denoiser is on "{device}". Call pipe.to("cpu") '
    "first."
)
MSG_XNNPACK_ALONE = (
    'quantize="{scheme}" has XNNPACK multiply integers, and format_options["delegate"] is "portable". Leave out one of '
    "them."
)
MSG_FLOAT32_ONLY = (
    'quantize="{scheme}" has XNNPACK multiply integers, beside which ExecuTorch has operators for float32 alone, and '
    "this denoiser is in {given}. Export it in float32."
)
MSG_NOT_CONVERTED = "The graphs {graphs} cannot be converted to ExecuTorch: {problem}. Nothing has been written."
MSG_NOT_WRITTEN = "The program {path} cannot be written: {problem}."
MSG_LAYOUT = (
    "The graphs of the bundle {root} must be methods of {program} with their own names, with their weights inside."
)
MSG_METHODS = "The program {path} has the methods {given}, and the manifest says {expected}."
MSG_OTHER = "The method {method} of {path} has {what} {given}, and the manifest says {expected}."


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for unknown options."""
    check_names(options, ["delegate"], 'format="executorch"')
    delegate = options.get("delegate", DELEGATES[0])
    if delegate not in DELEGATES:
        known = " or ".join(f'"{name}"' for name in DELEGATES)
        raise ConfigurationError(MSG_DELEGATE.format(expected=known, given=delegate))


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError: there are none."""
    if options:
        raise ConfigurationError(MSG_NO_LOAD_OPTIONS.format(given=", ".join(map(repr, options))))


def runtime_version() -> str:
    """What made the program."""
    return f"executorch {version('executorch')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`, as methods of one program.

    Raises:
        ConfigurationError: they are not on the CPU.
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
    """Write `graphs` as `write_graphs` does, those that are to be quantized with layers that multiply integers.

    Raises:
        ConfigurationError: as `write_graphs`, or there is no XNNPACK to do it.
        UnsupportedModelError: it does not for the denoiser's dtype.
        BundleError: as `write_graphs`.
    """
    if options.get("delegate", DELEGATES[0]) != DELEGATES[0]:
        raise ConfigurationError(MSG_XNNPACK_ALONE.format(scheme=quantizing.quantization.scheme))
    dtypes = {value.dtype for planned in graphs for value in planned.example_inputs if value.is_floating_point()}
    if dtypes != {torch.float32}:
        given = ", ".join(sorted(map(dtype_name, dtypes)))
        raise UnsupportedModelError(MSG_FLOAT32_ONLY.format(scheme=quantizing.quantization.scheme, given=given))
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
        raise ConfigurationError(MSG_ON_CPU.format(device=device))
    (folder / m.GRAPHS_FOLDER).mkdir()
    names = ", ".join(planned.name for planned in graphs)
    progress(f"Converting the graphs {names}")
    try:
        delegate = str(options.get("delegate", DELEGATES[0]))
        program = to_executorch({planned.name: planned.variant for planned in graphs}, delegate, integers)
    except Exception as error:  # ExecuTorch raises whatever its passes raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise BundleError(MSG_NOT_CONVERTED.format(graphs=names, problem=problem)) from error
    with (folder / PROGRAM_FILE).open("xb") as file:
        program.manager.write_to_file(file)
    return {
        name: WrittenGraph(PROGRAM_FILE, program.count(name), entry=name, quantized=name in integers)
        for name in program.operators
    }


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Compare what the program of the bundle `root` says of the method for `graph` with the manifest; run nothing.

    Raises:
        BundleError: it is not as the manifest says.
    """
    entries = {its.entry for its in manifest.graphs.values()}
    files = {its.file for its in manifest.graphs.values()}
    if entries != set(manifest.graphs) or files != {PROGRAM_FILE} or manifest.weights is not None:
        raise BundleError(MSG_LAYOUT.format(root=root, program=PROGRAM_FILE))
    path = root / PROGRAM_FILE
    try:
        program = open_program(path)
    except BackendError as error:
        raise BundleError(str(error)) from error
    if program.method_names != entries:
        given, expected = (", ".join(sorted(map(str, names))) for names in (program.method_names, entries))
        raise BundleError(MSG_METHODS.format(path=path, given=given, expected=expected))
    assert graph.entry is not None
    method = program.metadata(graph.entry)
    for what, count, info, specs in (
        ("inputs", method.num_inputs(), method.input_tensor_meta, inputs_of(graph)),
        ("outputs", method.num_outputs(), method.output_tensor_meta, outputs_of(graph)),
    ):
        given = ", ".join(_shown(info(position)) for position in range(count))
        expected = ", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in specs)
        if given != expected:
            told = {"method": graph.entry, "path": path, "what": what, "given": given, "expected": expected}
            raise BundleError(MSG_OTHER.format(**told))


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> ExecuTorchSession:
    """The graph in ExecuTorch's runtime; raise BackendError."""
    return ExecuTorchSession(graph, root, device)


def _shown(tensor: object) -> str:
    dtype = _DTYPES.get(tensor.dtype())  # type: ignore[attr-defined]
    return f"{'a dtype without a name' if dtype is None else dtype_name(dtype)}{list(tensor.sizes())}"  # type: ignore[attr-defined]
