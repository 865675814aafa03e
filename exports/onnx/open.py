"""Run a bundle's ONNX graphs, whole or in pieces."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from tgate_compile._errors import BackendError, first_line
from tgate_compile.bundle.manifest import Graph
from tgate_compile.bundle.read_manifest import inputs_of, output_shapes, outputs_of
from tgate_compile.exports.onnx.session import ELEMENT_TYPES, best_providers, open_session, run_bound, session_options

if TYPE_CHECKING:
    import onnx

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
            self._session = open_session(path, session_options(options), providers)  # type: ignore[arg-type]
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
