"""OpenVINO's files: a graph in XML, and its constants in a file that several graphs may share."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from tgate_compile._bundle.manifest import TensorSpec
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._errors import BundleError

#: A graph without its weights has some megabytes.
MAX_BYTES = 500_000_000

#: OpenVINO's names of element types, in these files.
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

MSG_NO_MODEL = "{path} is no graph of OpenVINO: {reason}."
MSG_RANGE = "{path} takes the constant {name!r} from bytes {offset} to {end} of a weights file that has {size}."
MSG_DIFFERS = "{path} has {given}, and the manifest says {expected}."


def share_constants(graph: Path, constants: Path, weights: WeightsFile) -> int:
    """Move what the graph in the XML file `graph` has in `constants` to `weights`; tell the number of its operators."""
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
    """Check the XML file at `path`, whose constants are in a file of so many bytes.

    Raises:
        BundleError: it is none of OpenVINO's, takes or returns something else than the manifest says, or takes
            constants from beyond the end of their file.
    """
    if path.stat().st_size > MAX_BYTES:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it is too large"))
    raw = path.read_bytes()
    if b"<!" in raw:  # comments and sections of characters, which OpenVINO never writes; and entities
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it has a declaration"))
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason=error)) from error
    for layer in root.iter("layer"):
        _check_constant(layer, path, weights_size)
    own = root.findall("./layers/layer")
    given = [_shown_input(layer) for layer in own if layer.get("type") == "Parameter"]
    wanted = [_shown(spec.name, spec.dtype, spec.shape) for spec in inputs]
    names = {text.partition(" ")[0] for text in given}
    # OpenVINO drops an input of which only the shape is used.
    _check_same(given, [text for text in wanted if text.partition(" ")[0] in names], path)
    results = [layer.get("output_names", "") for layer in own if layer.get("type") == "Result"]
    _check_same(results, [spec.name for spec in outputs], path)


def _check_constant(layer: ElementTree.Element, path: Path, weights_size: int) -> None:
    if layer.get("type") != "Const":
        return
    data = layer.find("data")
    numbers = [] if data is None else [data.get(name, "") for name in ("offset", "size")]
    if not numbers or not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it has a constant without a place"))
    offset, size = map(int, numbers)
    if offset + size > weights_size:
        told = {"name": (layer.get("name") or "")[:200], "offset": offset, "end": offset + size}
        raise BundleError(MSG_RANGE.format(path=path, size=weights_size, **told))


def _shown_input(layer: ElementTree.Element) -> str:
    data, port = layer.find("data"), layer.find("./output/port")
    if data is None or port is None:
        return "an input without a type"
    dtype = _DTYPES.get(data.get("element_type", ""))
    shape = [size.strip() for size in data.get("shape", "").split(",") if size.strip()]
    return _shown(port.get("names", ""), "another" if dtype is None else dtype_name(dtype), shape)


def _shown(name: str, dtype: str, shape: Sequence[object]) -> str:
    """A free size is any number, or `?`: which one each is, only the manifest tells."""
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
