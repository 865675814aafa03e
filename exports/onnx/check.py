"""Check that an ONNX file is what the manifest says, and reads its weights from the bundle's weights file only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import BundleError, first_line
from tgate_compile.bundle.manifest import WEIGHTS_FILE, TensorSpec
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.exports.onnx.session import ELEMENT_TYPES

if TYPE_CHECKING:
    import onnx

#: protobuf's own limit.
MAX_BYTES = 2**31 - 1

MSG_NO_MODEL = "{path} is not a valid ONNX model: {reason}."
MSG_DIFFERS = "{path} has {given}, but the manifest says {expected}."

_DTYPES = {element: dtype_name(dtype) for dtype, element in ELEMENT_TYPES.items()}


def check_onnx_file(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights_size: int) -> None:
    """Check the file at `path`, whose weights are in another file of `weights_size` bytes in the same folder.

    Raises:
        BundleError: it is not a valid ONNX model, has other inputs or outputs than the manifest says, or takes weights
            from outside the weights file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if path.stat().st_size > MAX_BYTES:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason="it is too large"))
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise BundleError(MSG_NO_MODEL.format(path=path, reason=first_line(error))) from error
    for tensor in _tensors(model):
        _check_location(tensor, path, weights_size)
    _check_specs(model.graph.input, inputs, path)
    _check_specs(model.graph.output, outputs, path)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of `model`: initializers and constants, also those of subgraphs and functions."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)
    for training in model.training_info:
        yield from _tensors_of_graph(training.initialization)
        yield from _tensors_of_graph(training.algorithm)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of_graph(graph)


def _check_location(tensor: onnx.TensorProto, path: Path, weights_size: int) -> None:
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    expected = Path(WEIGHTS_FILE).name
    if place.get("location") != expected or len(place) != len(tensor.external_data):
        raise BundleError(
            f"{path} takes the tensor {tensor.name!r} from {place.get('location')!r}, but the weights of a bundle must "
            f"be in {expected!r}."
        )
    offset, length = _number(place.get("offset", "0")), _number(place.get("length", ""))
    if offset is None or length is None or offset + length > weights_size:
        end = f"{place.get('offset')} + {place.get('length')}" if None in (offset, length) else offset + length  # type: ignore[operator]
        raise BundleError(
            f"{path} takes the tensor {tensor.name!r} from bytes {place.get('offset')} to {end} of a weights file "
            f"that has only {weights_size}."
        )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _check_specs(values: Sequence[Any], expected: Sequence[TensorSpec], path: Path) -> None:
    given = [_shown(value.name, *_type_of(value)) for value in values]
    required = [_shown(spec.name, spec.dtype, list(spec.shape)) for spec in expected]
    for one, other in zip(given, required, strict=False):
        if one != other:
            raise BundleError(MSG_DIFFERS.format(path=path, given=one, expected=other))
    if len(given) != len(required):
        raise BundleError(
            MSG_DIFFERS.format(path=path, given=f"{len(given)} inputs or outputs", expected=f"{len(required)}")
        )


def _type_of(value: Any) -> tuple[str, list[Any]]:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return _DTYPES.get(tensor.elem_type, f"element type {tensor.elem_type}"), shape


def _shown(name: str, dtype: str, shape: list[Any]) -> str:
    return f"{name[:200]} ({dtype}, {shape})"
