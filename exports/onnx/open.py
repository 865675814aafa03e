"""Check a bundle's ONNX files, and run them, whole or in pieces."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from tgate_compile._errors import BackendError, BundleError, first_line
from tgate_compile.bundle.manifest import WEIGHTS_FILE, Graph, TensorSpec
from tgate_compile.bundle.read_manifest import inputs_of, output_shapes, outputs_of
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.exports.onnx.session import ELEMENT_TYPES, best_providers, open_session, run_bound, session_options

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


logger = logging.getLogger(__name__)


class OnnxSession:
    """A session that runs the graph in the file `path`, which `graph` describes, for inputs on `device`.

    ONNX Runtime maps the weights from the bundle's file. With prepacking, which is faster, it copies them into its own
    layouts.
    """

    def __init__(self, graph: Graph, path: Path, device: torch.device, options: Mapping[str, object]) -> None:
        began = time.perf_counter()
        self._graph = graph
        self._path = path
        self._device = device
        providers = options.get("providers") or best_providers(device)
        try:
            self._session = open_session(path, session_options(options), providers, device)  # type: ignore[arg-type]
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BackendError(failed(path, error)) from error
        logger.info("opened %s in ONNX Runtime in %.1f s", path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The execution provider with the highest priority."""
        return str(self._session.get_providers()[0])

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last."""
        named = {spec.name: tensor for spec, tensor in zip(inputs_of(self._graph), inputs, strict=True)}
        outputs = [
            (spec.name, shape, getattr(torch, spec.dtype))
            for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
        ]
        try:
            return run_bound(self._session, named, outputs, self._device)
        except RuntimeError as error:
            raise BackendError(failed(self._path, error)) from error


def failed(path: Path, error: Exception) -> str:
    """Return the message for an error that ONNX Runtime raises when it opens or runs the graph at `path`."""
    return f"ONNX Runtime could not run the {path.stem} graph of the bundle ({first_line(error, named=True)})."


#: The approximate size of the weights in a piece, in bytes. On a CPU, ONNX Runtime also holds a float32 copy of float16
#: weights.
PIECE = 256 << 20


class PiecewiseSession:
    """A session that runs the graph in the file `path` on the CPU with little memory, to check its outputs.

    The whole graph is opened once, to see that ONNX Runtime accepts it, and closed again. A run executes the operators
    in their order, in pieces: each piece has its own session, which is closed before the next one is opened.
    """

    provider = "CPUExecutionProvider"

    def __init__(self, graph: Graph, path: Path) -> None:
        import onnx

        self._graph = graph
        self._path = path
        try:
            open_session(path, self._settings(), [self.provider])
            model = onnx.load_model(path, load_external_data=False)
            returned, expected = [value.name for value in model.graph.output], [spec.name for spec in outputs_of(graph)]
            if returned != expected:
                raise ValueError(f"it returns {returned}, expected {expected}")
            self._pieces = list(_pieces(model))
            self._taken = {value.name for piece in self._pieces for value in piece.graph.input}
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BackendError(failed(self._path, error)) from error

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last.

        Raises:
            BackendError: ONNX Runtime fails.
        """
        results = {
            spec.name: torch.empty(shape, dtype=getattr(torch, spec.dtype))
            for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
        }
        given = {spec.name: tensor.contiguous() for spec, tensor in zip(inputs_of(self._graph), inputs, strict=True)}
        between: dict[str, NDArray[Any]] = {}
        try:
            for piece in self._pieces:
                self._run_piece(piece, given, between, results)
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BackendError(failed(self._path, error)) from error
        return list(results.values())

    def _run_piece(
        self,
        piece: onnx.ModelProto,
        given: dict[str, torch.Tensor],
        between: dict[str, NDArray[Any]],
        results: dict[str, torch.Tensor],
    ) -> None:
        import onnx

        for value in piece.graph.input:  # the dtypes of intermediate values are those that earlier pieces returned
            value.type.tensor_type.elem_type = (
                ELEMENT_TYPES[given[value.name].dtype]
                if value.name in given
                else onnx.helper.np_dtype_to_tensor_dtype(between[value.name].dtype)
            )
        session = open_session(piece.SerializeToString(), self._settings(), [self.provider])
        binding: Any = session.io_binding()
        for value in piece.graph.input:
            if value.name in given:
                _bind(binding.bind_input, value.name, given[value.name])
            else:
                binding.bind_cpu_input(value.name, between[value.name])
        for value in piece.graph.output:
            if value.name in results:
                _bind(binding.bind_output, value.name, results[value.name])
            else:
                binding.bind_output(value.name, "cpu")
        session.run_with_iobinding(binding)
        for value, result in zip(piece.graph.output, binding.get_outputs(), strict=True):
            if value.name not in results or value.name in self._taken:
                between[value.name] = result.numpy()  # a copy: the OrtValue would keep the session's files mapped

    def _settings(self) -> Any:
        settings = session_options({"prepacking": False, "optimized": False})
        settings.enable_cpu_mem_arena = False
        folder = str(self._path.parent)
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return settings


def _bind(bind: Any, name: str, tensor: torch.Tensor) -> None:
    bind(name, "cpu", 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())


def _pieces(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Split `model`, whose operators are in topological order, into pieces with about `PIECE` bytes of weights."""
    import onnx

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    last_use = {name: at for at, node in enumerate(graph.node) for name in node.input}
    last_use |= {value.name: len(graph.node) for value in graph.output}
    is_output = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    size = 0
    for at, node in enumerate(graph.node):
        nodes.append(node)
        size += sum(_nbytes(weights[name]) for name in node.input if name in weights)
        if size < PIECE and at + 1 < len(graph.node):
            continue
        made = {name for node in nodes for name in node.output if name}
        taken = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
        kept = [name for node in nodes for name in node.output if name and last_use.get(name, -1) > at]
        kept += [name for name in is_output if name in made and name not in kept]
        piece = onnx.helper.make_graph(
            nodes,
            graph.name,
            [onnx.ValueInfoProto(name=name) for name in taken if name not in weights],
            [onnx.ValueInfoProto(name=name) for name in kept],
            [weights[name] for name in taken if name in weights],
        )
        yield onnx.helper.make_model(piece, opset_imports=model.opset_import, ir_version=model.ir_version)
        nodes, size = [], 0


def _nbytes(tensor: onnx.TensorProto) -> int:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return int(place.get("length", 0))
