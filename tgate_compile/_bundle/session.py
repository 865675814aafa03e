"""One of a bundle's graphs in ONNX Runtime, on torch's memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tgate_compile._backends.onnx_runtime import ELEMENT_TYPES
from tgate_compile._bundle.manifest import Graph
from tgate_compile._errors import BackendError

logger = logging.getLogger(__name__)

MSG_FAILED = "ONNX Runtime could not run the {graph} graph of the bundle ({problem})."


class GraphSession:
    """Runs the graph in the file `path`, which `graph` describes, for inputs on `device`.

    ONNX Runtime maps the weights from the bundle's file. With prepacking, which is faster, it copies them into layouts
    of its own.
    """

    def __init__(self, graph: Graph, path: Path, device: torch.device, options: Mapping[str, object]) -> None:
        import onnxruntime

        began = time.perf_counter()
        self._graph = graph
        self._device = device
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # its warnings are about its own placement of operators
        threads = options.get("threads")
        settings.intra_op_num_threads = threads if isinstance(threads, int) else torch.get_num_threads()
        if options.get("prepacking") is False:
            settings.add_session_config_entry("session.disable_prepacking", "1")
            # Beyond "extended" are the layouts of convolutions, for which their weights are copied.
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        on_gpu = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = options.get("providers") or [*on_gpu, "CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(path, settings, providers=providers)
        except Exception as error:  # ONNX Runtime has no common base class of its errors
            raise BackendError(_failed(path, error)) from error
        self._path = path
        logger.info("opened %s in ONNX Runtime in %.1f s", path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The execution provider that is asked first."""
        return str(self._session.get_providers()[0])

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        binding = self._session.io_binding()
        device, index = self._device.type, self._device.index or 0
        contiguous = [tensor.contiguous() for tensor in inputs]  # which must live until the run is over
        for spec, tensor in zip([*self._graph.inputs, *self._graph.cache_inputs], contiguous, strict=True):
            element = ELEMENT_TYPES[tensor.dtype]
            binding.bind_input(spec.name, device, index, element, list(tensor.shape), tensor.data_ptr())
        outputs = []
        for spec in [*self._graph.outputs, *self._graph.cache_outputs]:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            element = ELEMENT_TYPES[tensor.dtype]
            binding.bind_output(spec.name, device, index, element, spec.shape, tensor.data_ptr())
            outputs.append(tensor)
        if device == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise BackendError(_failed(self._path, error)) from error
        return outputs


def _failed(path: Path, error: Exception) -> str:
    return MSG_FAILED.format(graph=path.stem, problem=f"{type(error).__name__}: {error}".splitlines()[0])
