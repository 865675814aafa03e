"""Write the graphs of a bundle as a Core ML package."""

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

from tgate_compile._errors import BackendError, BundleError, ConfigurationError, check_installed, first_line
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.read_manifest import inputs_of, outputs_of
from tgate_compile.engine.backends import check_known_options, one_of
from tgate_compile.passes.graphs import Variant, copy_graph, flat_program
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    from tgate_compile.bundle.formats import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoreMLFunction:
    """A variant, and the names of its inputs and outputs, which consist of letters, digits and underscores."""

    variant: Variant
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def to_coreml(functions: Mapping[str, CoreMLFunction], path: Path, *, target: str, precision: str) -> None:
    """Write `functions` to the package `path`, with the first of them as its default function.

    Shapes are fixed. A scalar input becomes one of shape [1], because Core ML has no scalars; integers have 32 bits.
    Inputs and outputs are float32, whatever `precision` the functions compute in, `"float16"` or `"float32"`.
    `target` is the minimum deployment target.

    Raises:
        ConfigurationError: coremltools is not installed.
        Exception: of any class, because the errors of coremltools have no common base class.
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
    """Return the numpy type of an input; the default of coremltools for floating-point inputs would be float16."""
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
    """Replace scalar inputs by inputs of shape [1]."""
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
    """Silence the progress bars of coremltools, its warnings about versions and platforms, and torch's deprecations."""
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
#: The file in a package that has its functions, and the path that these have for the file with their weights.
_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_WEIGHTS = "@model_path/weights/weight.bin"

#: The deployment targets. Packages with several functions need iOS 18 or macOS 15, which have the same Core ML version.
TARGETS = ("iOS18", "iOS26")
PRECISIONS = ("float16", "float32")

MSG_NOT_HERE = (
    'Bundles of format "coreml" run on Apple devices, with iOS 18 or macOS 15 or later, and are used from Swift: see '
    "examples/coreml. Here, load a bundle of another format."
)
MSG_MEASURE = (
    "Steps of this schedule are decided at run time by means over a whole activation, which Core ML would compute in "
    "{precision}: there they can overflow, and this machine cannot check the result. Pass "
    'format_options={{"precision": "float32"}}, or choose a schedule that is known beforehand, such as '
    "BlockCache(mask=...)."
)
MSG_NO_PACKAGE = "{path} is not a Core ML package with {expected}: {reason}."


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options of `export` that are not valid."""
    known = {"minimum_deployment_target": one_of(TARGETS), "precision": one_of(PRECISIONS)}
    check_known_options('format="coreml"', "format_options", options, known)


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise BackendError: bundles of this format cannot be loaded in Python."""
    raise BackendError(MSG_NOT_HERE)


def runtime_version() -> str:
    """Return the version of coremltools, which converts the graphs."""
    return f"coremltools {version('coremltools')}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`.

    Raises:
        ConfigurationError: steps are decided at run time, and the graphs are to compute in float16.
        BundleError: the graphs cannot be converted.
    """
    target, precision = options.get("minimum_deployment_target", TARGETS[0]), options.get("precision", PRECISIONS[0])
    if precision != "float32" and any(planned.variant.phase.part == "head" for planned in graphs):
        raise ConfigurationError(MSG_MEASURE.format(precision=precision))
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
    try:
        to_coreml(functions, folder / PACKAGE, target=str(target), precision=str(precision))
    except Exception as error:  # the errors of coremltools have no common base class
        problem = first_line(error, named=True)
        raise BundleError(f"coremltools cannot convert the graphs: {problem}. Nothing has been written.") from error
    return {
        planned.name: WrittenGraph(PACKAGE, _nodes(planned), feature_name(planned.name), checked_on=None)
        for planned in graphs
    }


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Check the function of `graph` in the package of the bundle at `root`.

    Raises:
        BundleError: it has other inputs or outputs than the manifest says, or takes weights from another file.
    """
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = root / graph.file
    details = {"path": path, "expected": f"a function {graph.entry}"}
    if graph.file != PACKAGE or f"{PACKAGE}/{_MODEL}" not in manifest.files:
        raise BundleError(MSG_NO_PACKAGE.format(**details, reason=f"{PACKAGE}/{_MODEL} does not exist"))
    model = Model_pb2.Model()
    try:
        model.ParseFromString((path / _MODEL).read_bytes())
    except DecodeError as error:
        raise BundleError(MSG_NO_PACKAGE.format(**details, reason=error)) from error
    found = [function for function in model.description.functions if function.name == graph.entry]
    if len(found) != 1 or graph.entry not in model.mlProgram.functions:
        raise BundleError(MSG_NO_PACKAGE.format(**details, reason="it has no such function"))
    elsewhere = next((name for name in _files(model.mlProgram.functions[graph.entry]) if name != _WEIGHTS), None)
    if elsewhere is not None:
        reason = f"it takes weights from {elsewhere[:200]!r}"
        raise BundleError(MSG_NO_PACKAGE.format(**details, reason=reason))
    for features, specs in ((found[0].input, inputs_of(graph)), (found[0].output, outputs_of(graph))):
        given, expected = [_shown_feature(feature) for feature in features], [_shown(spec) for spec in specs]
        if given != expected:
            pairs = (pair for pair in zip(given, expected, strict=False) if pair[0] != pair[1])
            one, other = (str(text)[:300] for text in next(pairs, (given, expected)))
            raise BundleError(f"The function {graph.entry} of {path} has {one}, but the manifest says {other}.")


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
    """Raise BackendError: bundles of this format cannot be loaded in Python."""
    raise BackendError(MSG_NOT_HERE)


def feature_name(name: str) -> str:
    """Return the name in the package of a graph, an input or an output that the manifest calls `name`."""
    return re.sub("[^A-Za-z0-9_]", "_", name)


def _check_dtypes(planned: PlannedGraph) -> None:
    for name, tensor in zip(planned.own_names, planned.example_inputs, strict=True):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise BundleError(
                f"The {planned.name} graph takes {name} in {dtype}, but coremltools supports only float32 and integer "
                'inputs. Export the float32 model; it computes in float16 by default (format_options={"precision": '
                '"float16"}).'
            )


def _nodes(planned: PlannedGraph) -> int:
    return sum(node.op == "call_function" for node in planned.variant.program.graph.nodes)


def _files(message: Any) -> Iterator[str]:
    """Yield the names of all files that values in `message` are taken from."""
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
