"""Write a bundle's graphs as Core ML packages."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tgate_compile._arguments import check_names
from tgate_compile._errors import BackendError, BundleError, ConfigurationError, check_installed
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph, inputs_of, outputs_of
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.passes.editing import copy_graph, flat_program
from tgate_compile.passes.graphs import Variant
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    from tgate_compile.bundle.formats import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoreMLFunction:
    """A variant, and the names of its inputs and outputs, which are letters, digits and underscores."""

    variant: Variant
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def to_coreml(functions: Mapping[str, CoreMLFunction], path: Path, *, target: str, precision: str) -> None:
    """Write `functions` to the package `path`, the first of them its default, for devices from `target` on.

    Shapes are fixed. A scalar input becomes one of shape [1], for Core ML has none; whole numbers have 32 bits. Inputs
    and outputs are float32, whatever `precision` the functions compute in, `"float16"` or `"float32"`.

    Raises:
        ConfigurationError: coremltools is not installed.
        Exception: of any class; coremltools has no common base class of its errors.
    """
    check_installed("coremltools", extra="coreml", what='format="coreml"')
    began = time.perf_counter()
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as home:
        import coremltools
        from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

        together = MultiFunctionDescriptor()
        for name, function in functions.items():
            package = str(Path(home, f"{name}.mlpackage"))
            program = _program(function.variant)
            taken = zip(function.inputs, program.graph_signature.user_inputs, strict=True)
            nodes = {node.name: node for node in program.graph.nodes}
            model = coremltools.convert(
                program,
                convert_to="mlprogram",
                inputs=[
                    coremltools.TensorType(name=given, dtype=_dtype(nodes[str(own)].meta["val"]))
                    for given, own in taken
                ],
                outputs=[coremltools.TensorType(name=given, dtype=np.float32) for given in function.outputs],
                minimum_deployment_target=coremltools.target[target],
                compute_precision=coremltools.precision[precision.upper()],
                skip_model_load=True,
            )
            model.save(package)
            together.add_function(package, src_function_name="main", target_function_name=name)
        together.default_function_name = next(iter(functions))
        save_multifunction(together, str(path))
    logger.info("converted %d graphs to Core ML in %.1f s", len(functions), time.perf_counter() - began)


def _dtype(tensor: torch.Tensor) -> type:
    """coremltools' default for numbers with a point would be float16."""
    return np.float32 if tensor.is_floating_point() else np.int32


def _program(variant: Variant) -> torch.export.ExportedProgram:
    graph_module = copy_graph(variant.program.graph_module)
    _vectors_for_scalars(graph_module, variant.program.graph_signature.user_inputs)
    if lower_complex(graph_module).changes:
        remove_dead(graph_module)
    graph_module.recompile()
    program: torch.export.ExportedProgram = flat_program(variant.program, graph_module).run_decompositions({})
    return program


def _vectors_for_scalars(graph_module: torch.fx.GraphModule, inputs: Sequence[object]) -> None:
    """Have inputs without dimensions given as ones of shape [1]."""
    for node in list(graph_module.graph.nodes):
        if node.op != "placeholder" or node.name not in inputs or node.meta["val"].ndim:
            continue
        scalar = node.meta["val"]
        with graph_module.graph.inserting_after(node):
            squeezed: Any = graph_module.graph.call_function(torch.ops.aten.squeeze.dim, (node, 0))
        node.replace_all_uses_with(squeezed, delete_user_cb=lambda user, own=squeezed: user is not own)
        squeezed.meta["val"] = scalar
        with scalar.fake_mode:
            node.meta["val"] = torch.empty((1,), dtype=scalar.dtype, device=scalar.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' bars of progress, and its notes on versions that it has not been tested with and on what it
    does without where nothing can be run; and without torch's deprecation when it copies a program."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


PACKAGE = "graphs/graphs.mlpackage"
#: Where in a package its functions are, and how they call the file with their weights.
_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_WEIGHTS = "@model_path/weights/weight.bin"

#: Packages of several functions need iOS 18 or macOS 15, which is the same version of Core ML.
TARGETS = ("iOS18", "iOS26")
PRECISIONS = ("float16", "float32")

MSG_OPTION = 'format_options["{name}"] must be {expected}, but got {given!r}.'
MSG_NOT_HERE = (
    'Bundles of format "coreml" run on Apple\'s devices, with iOS 18 or macOS 15 and later, from Swift: '
    "examples/coreml has a beginning. Load a bundle of another format here."
)
MSG_DTYPE = (
    "The {graph} graph takes {name} in {dtype}, and Core ML's converter takes float32 and whole numbers. Export the "
    'float32 model: format_options={{"precision": "float16"}}, the default, has it compute in float16.'
)
MSG_NOT_CONVERTED = "Core ML's converter does not take the graphs: {problem}. Nothing has been written."
MSG_DIFFERS = "The function {entry} of {path} has {given}, and the manifest says {expected}."
MSG_NO_PACKAGE = "{path} is no Core ML package of {expected}: {reason}."


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the format does not know."""
    known: Mapping[str, Sequence[str]] = {"minimum_deployment_target": TARGETS, "precision": PRECISIONS}
    check_names(options, known, 'format="coreml"')
    for name, given in options.items():
        if given not in known[name]:
            expected = " or ".join(f'"{value}"' for value in known[name])
            raise ConfigurationError(MSG_OPTION.format(name=name, expected=expected, given=given))


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise BackendError: it is not loaded into Python."""
    raise BackendError(MSG_NOT_HERE)


def runtime_version() -> str:
    """What converted the graphs."""
    return f"coremltools {version('coremltools')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`.

    Raises:
        BundleError: they cannot be converted.
    """
    (folder / m.GRAPHS_FOLDER).mkdir()
    for planned in graphs:
        _check_dtypes(planned)
    progress("Converting the graphs to Core ML")
    functions = {
        feature_name(planned.name): CoreMLFunction(
            planned.variant,
            tuple(map(feature_name, planned.input_names)),
            tuple(map(feature_name, planned.output_names)),
        )
        for planned in graphs
    }
    target, precision = options.get("minimum_deployment_target", TARGETS[0]), options.get("precision", PRECISIONS[0])
    try:
        to_coreml(functions, folder / PACKAGE, target=str(target), precision=str(precision))
    except Exception as error:  # coremltools has no common base class of its errors
        problem = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise BundleError(MSG_NOT_CONVERTED.format(problem=problem)) from error
    return {
        planned.name: WrittenGraph(PACKAGE, _nodes(planned), feature_name(planned.name), checked_on=None)
        for planned in graphs
    }


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Check the function of `graph` in the package in the bundle `root`.

    Raises:
        BundleError: it takes or returns something else than the manifest says, or takes weights from elsewhere.
    """
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = root / graph.file
    told = {"path": path, "expected": f"a function {graph.entry}"}
    if graph.file != PACKAGE or f"{PACKAGE}/{_MODEL}" not in manifest.files:
        raise BundleError(MSG_NO_PACKAGE.format(**told, reason=f"{PACKAGE}/{_MODEL} is not there"))
    model = Model_pb2.Model()
    try:
        model.ParseFromString((path / _MODEL).read_bytes())
    except DecodeError as error:
        raise BundleError(MSG_NO_PACKAGE.format(**told, reason=error)) from error
    found = [function for function in model.description.functions if function.name == graph.entry]
    if len(found) != 1 or graph.entry not in model.mlProgram.functions:
        raise BundleError(MSG_NO_PACKAGE.format(**told, reason="there is none"))
    elsewhere = next((name for name in _files(model.mlProgram.functions[graph.entry]) if name != _WEIGHTS), None)
    if elsewhere is not None:
        raise BundleError(MSG_NO_PACKAGE.format(**told, reason=f"it takes weights from {elsewhere[:200]!r}"))
    for given, expected in ((found[0].input, inputs_of(graph)), (found[0].output, outputs_of(graph))):
        shown, wanted = [_shown_feature(feature) for feature in given], [_shown(spec) for spec in expected]
        if shown != wanted:
            differs = next((pair for pair in zip(shown, wanted, strict=False) if pair[0] != pair[1]), (shown, wanted))
            one, other = (str(text)[:300] for text in differs)
            raise BundleError(MSG_DIFFERS.format(entry=graph.entry, path=path, given=one, expected=other))


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
    """Raise BackendError: it is not loaded into Python."""
    raise BackendError(MSG_NOT_HERE)


def feature_name(name: str) -> str:
    """What a graph, an input or an output that the manifest calls `name` is called in the package."""
    return re.sub("[^A-Za-z0-9_]", "_", name)


def _check_dtypes(planned: PlannedGraph) -> None:
    for name, tensor in zip(planned.own_names, planned.example_inputs, strict=True):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise BundleError(MSG_DTYPE.format(graph=planned.name, name=name, dtype=dtype))


def _nodes(planned: PlannedGraph) -> int:
    return sum(node.op == "call_function" for node in planned.variant.program.graph.nodes)


def _files(message: Any) -> Iterator[str]:
    """The names of all files that values in `message` are taken from."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.name == "blobFileValue":
            yield value.fileName
        elif field.message_type.GetOptions().map_entry:
            for entry in value.values():
                if hasattr(entry, "ListFields"):
                    yield from _files(entry)
        else:
            for each in value if field.is_repeated else (value,):
                yield from _files(each)


def _shown(spec: m.TensorSpec) -> str:
    dtype = {"int64": "int32", "bool": "float32"}.get(spec.dtype, spec.dtype)
    return f"{feature_name(spec.name)} ({dtype}, {list(spec.shape) or [1]})"


def _shown_feature(feature: Any) -> str:
    array = feature.type.multiArrayType
    dtype = array.ArrayDataType.Name(array.dataType).lower() if array.dataType else "no array"
    return f"{feature.name[:200]} ({dtype}, {list(array.shape)})"
