"""Write a bundle's graphs as OpenVINO IR."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from tgate_compile._errors import BundleError, first_line
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle import read_manifest
from tgate_compile.bundle.calibration import Quantizing
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.manifest import TensorSpec
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.weights import WeightsFile, dtype_name
from tgate_compile.engine.backends import check_known_options
from tgate_compile.exports.onnx import save as onnx_graphs
from tgate_compile.exports.openvino.session import OpenVinoSession, core, openvino
from tgate_compile.exports.openvino.session import check_options as check_backend_options

#: The largest graph file that is read, in bytes. Without weights, a typical graph has a few megabytes.
MAX_BYTES = 500_000_000

#: OpenVINO's names of element types in these files.
_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "boolean": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}

MSG_NO_MODEL = "{path} is not a valid OpenVINO graph: {reason}."
MSG_DIFFERS = "{path} has {given}, but the manifest says {expected}."


def share_constants(graph: Path, constants: Path, weights: WeightsFile) -> int:
    """Move the constants of the graph in the XML file `graph` from the file `constants` to `weights`.

    Returns the number of operators in the graph.
    """
    tree = ElementTree.parse(graph)
    layers = list(tree.iter("layer"))
    content = torch.from_file(str(constants), shared=False, size=constants.stat().st_size, dtype=torch.uint8)
    for layer in layers:
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and int(data.get("size", "0")):
            begin = int(data.get("offset", "0"))
            offset, _ = weights.add(content[begin : begin + int(data.get("size", "0"))])
            data.set("offset", str(offset))
    tree.write(graph, encoding="utf-8", xml_declaration=True)
    return sum(layer.get("type") not in ("Const", "Parameter", "Result") for layer in layers)


def check_ir(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights_size: int) -> None:
    """Check the XML file at `path`, whose constants are in a file of `weights_size` bytes.

    Raises:
        BundleError: it is not a valid OpenVINO graph, has other inputs or outputs than the manifest says, or takes
            constants from beyond the end of their file.
    """
    if path.stat().st_size > MAX_BYTES:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it is too large"))
    raw = path.read_bytes()
    if b"<!" in raw:  # comments, CDATA sections and entity declarations, none of which OpenVINO writes
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it has a declaration, a comment or a CDATA section"))
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason=error)) from error
    for layer in root.iter("layer"):
        _check_constant(layer, path, weights_size)
    own = root.findall("./layers/layer")
    given = [_shown_input(layer) for layer in own if layer.get("type") == "Parameter"]
    expected = [_shown(spec.name, spec.dtype, spec.shape) for spec in inputs]
    names = {text.partition(" ")[0] for text in given}
    # OpenVINO drops inputs of which only the shape is used.
    _check_same(given, [text for text in expected if text.partition(" ")[0] in names], path)
    results = [layer.get("output_names", "") for layer in own if layer.get("type") == "Result"]
    _check_same(results, [spec.name for spec in outputs], path)


def _check_constant(layer: ElementTree.Element, path: Path, weights_size: int) -> None:
    if layer.get("type") != "Const":
        return
    data = layer.find("data")
    numbers = [] if data is None else [data.get(name, "") for name in ("offset", "size")]
    if not numbers or not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it has a constant without a valid offset and size"))
    offset, size = map(int, numbers)
    if offset + size > weights_size:
        raise BundleError(
            f"{path} takes the constant {(layer.get('name') or '')[:200]!r} from bytes {offset} to {offset + size} of "
            f"a weights file that has only {weights_size}."
        )


def _shown_input(layer: ElementTree.Element) -> str:
    data, port = layer.find("data"), layer.find("./output/port")
    if data is None or port is None:
        return "an input without a type"
    dtype = _DTYPES.get(data.get("element_type", ""))
    shape = [size.strip() for size in data.get("shape", "").split(",") if size.strip()]
    return _shown(port.get("names", ""), "another" if dtype is None else dtype_name(dtype), shape)


def _shown(name: str, dtype: str, shape: Sequence[object]) -> str:
    """Return a description of a tensor, with `?` for free sizes, whose names only the manifest has."""
    sizes = ", ".join(text if text.isdigit() else "?" for text in map(str, shape))
    return f"{name[:200]} ({dtype}, [{sizes}])"


def _check_same(given: Sequence[str], expected: Sequence[str], path: Path) -> None:
    for one, other in zip(given, expected, strict=False):
        if one != other:
            raise BundleError(MSG_DIFFERS.format(path=path, given=one[:300], expected=other))
    if len(given) != len(expected):
        raise BundleError(
            MSG_DIFFERS.format(path=path, given=f"{len(given)} inputs or outputs", expected=f"{len(expected)}")
        )


#: The temporary folder for the ONNX files to convert, and for constants until they are shared.
_SCRATCH = "scratch"


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for any options of `export`: this format has none."""
    check_known_options('format="openvino"', "format_options", options, {})


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options that the backend `openvino` does not know."""
    check_backend_options(options)


def runtime_version() -> str:
    """Return the version of OpenVINO, which converts the graphs and runs them to compare them with PyTorch."""
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
    """Write `graphs` as `write_graphs` does, quantized like ONNX graphs: OpenVINO's converter keeps their integers.

    Raises:
        BundleError: as `write_graphs`.
    """
    scratch = folder / _SCRATCH
    scratch.mkdir()
    models = onnx_graphs.write_quantized(graphs, scratch, {}, quantizing, progress)
    return _converted(models, scratch, folder, progress)


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Raise BundleError unless the file of `graph` in the bundle at `root` is valid; its weights are not read."""
    inputs, outputs = read_manifest.inputs_of(graph), read_manifest.outputs_of(graph)
    check_ir(root / graph.file, inputs, outputs, manifest.files[m.WEIGHTS_FILE].size)


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> OpenVinoSession:
    """Open the graph in OpenVINO, or raise BackendError."""
    return OpenVinoSession(graph, root, device, options)


def _converted(
    models: Mapping[str, WrittenGraph], scratch: Path, folder: Path, progress: Progress
) -> dict[str, WrittenGraph]:
    """Convert the ONNX files in `scratch` to OpenVINO files in `folder`, and remove `scratch`."""
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
            except Exception as error:  # openvino's errors have no common base class
                problem = first_line(error, named=True)
                raise BundleError(
                    f"OpenVINO cannot convert the {name} graph: {problem}. Nothing has been written."
                ) from error
            nodes = share_constants(folder / path, constants, weights)
            written[name] = replace(model, file=path, nodes=nodes)
    shutil.rmtree(scratch)
    return written
