"""One of a bundle's engines in TensorRT, on torch's memory and torch's stream: nothing is copied on the way."""

from __future__ import annotations

import importlib
import logging
import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_compile._bundle.manifest import Graph
from tgate_compile._bundle.session import inputs_of, output_shapes, outputs_of
from tgate_compile._bundle.tensorrt_refit import is_stripped, onnx_beside, refit
from tgate_compile._bundle.tensorrt_runtime_cache import TensorRTRuntimeCache
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._errors import BackendError
from tgate_compile.exports.tensorrt_log import tensorrt_log
from tgate_compile.exports.to_tensorrt import DTYPES

logger = logging.getLogger(__name__)

MSG_NOT_OPENED = (
    "{package} {version} cannot open the engine of the {graph} graph ({problem}). An engine is for the version that "
    "built it and for GPUs of the compute capabilities that it was built for; here is {gpu}."
)
MSG_DIFFERS = "The engine of the {graph} graph has {given}, and the manifest says {expected}."
MSG_FAILED = "{package} could not run the {graph} graph ({problem})."


class TensorRTSession:
    """Runs the engine in the file `path`, which `graph` describes, on the GPU `device`.

    The memory for what is between inputs and outputs comes from torch for each run, and goes back: the graphs of a
    bundle share it, and so does all else that torch runs on that stream.
    """

    def __init__(
        self, package: str, graph: Graph, path: Path, device: torch.device, options: Mapping[str, object]
    ) -> None:
        assert device.type == "cuda", "load has checked it"
        began = time.perf_counter()
        self._trt: Any = importlib.import_module(package)
        self._package = package
        self._log = tensorrt_log(package)
        self._graph = graph
        self._path = path
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._shapes: list[torch.Size] | None = None
        with torch.cuda.device(device):
            self._runtime, self._engine = self._open(host_code=options.get("host_code") is True)
            self._check()
            if is_stripped(package, self._engine):
                self.refit({})
            if "weight_budget" in options:
                self._engine.weight_streaming_budget_v2 = options["weight_budget"]
            self._cache = TensorRTRuntimeCache(self._trt, self._engine, path, options.get("runtime_cache"))
            self._context = self._cache.context()
        if self._context is None:
            raise BackendError(self._failed())
        logger.info("opened %s in %s in %.1f s", path.name, package, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The package and the GPU."""
        return f"{self._package} on {torch.cuda.get_device_name(self._device)}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        context = self._context
        shapes = [tensor.shape for tensor in inputs]
        with torch.cuda.device(self._device):
            outputs = [
                torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
                for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
            ]
            # Which lives until the run has been put on the stream, and whose memory later tensors get after it.
            bound = [tensor.contiguous() for tensor in inputs]
            arena = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device=self._device)
            if shapes != self._shapes:
                for spec, shape in zip(inputs_of(self._graph), shapes, strict=True):
                    self._need(context.set_input_shape(spec.name, tuple(shape)))
            for spec, tensor in zip(
                (*inputs_of(self._graph), *outputs_of(self._graph)), (*bound, *outputs), strict=True
            ):
                self._need(context.set_tensor_address(spec.name, tensor.data_ptr()))
            context.set_device_memory(arena.data_ptr(), arena.numel())
            # TensorRT would wait for the whole GPU on the default stream: it gets one of its own, in the same order.
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            self._need(context.execute_async_v3(self._stream.cuda_stream))
            current.wait_stream(self._stream)
        if shapes != self._shapes:
            self._shapes = shapes
            self._cache.save()
        return outputs

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put `weights` into the engine, by their names in the denoiser; those that are missing are the bundle's.

        Raises:
            BackendError: the engine has its weights inside, once and for all, or TensorRT does not take these.
        """
        torch.cuda.synchronize(self._device)
        refit(self._package, self._engine, onnx_beside(self._path), weights)

    def _open(self, *, host_code: bool) -> tuple[Any, Any]:
        runtime = self._trt.Runtime(self._log)
        runtime.engine_host_code_allowed = host_code
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            major, minor = torch.cuda.get_device_capability(self._device)
            raise BackendError(
                MSG_NOT_OPENED.format(
                    package=self._package,
                    version=self._trt.__version__,
                    graph=self._path.stem,
                    problem=self._log.last_problem,
                    gpu=f"{torch.cuda.get_device_name(self._device)}, {major}.{minor}",
                )
            )
        return runtime, engine

    def _check(self) -> None:
        """Raise BackendError unless the engine takes and returns what the manifest says: names, dtypes and ranks."""
        engine, mode = self._engine, self._trt.TensorIOMode
        expected = [(mode.INPUT, spec) for spec in inputs_of(self._graph)]
        expected += [(mode.OUTPUT, spec) for spec in outputs_of(self._graph)]
        wanted = {spec.name: (kind.name.lower(), spec.dtype, len(spec.shape)) for kind, spec in expected}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = {
            name: (
                engine.get_tensor_mode(name).name.lower(),
                dtype_name(DTYPES[engine.get_tensor_dtype(name).name]),
                len(engine.get_tensor_shape(name)),
            )
            for name in names
        }
        for name in {**wanted, **given}:
            if given.get(name) != wanted.get(name):
                told = {"given": (name, given.get(name)), "expected": (name, wanted.get(name))}
                raise BackendError(MSG_DIFFERS.format(graph=self._path.stem, **told))

    def _need(self, done: bool) -> None:
        if not done:
            raise BackendError(self._failed())

    def _failed(self) -> str:
        return MSG_FAILED.format(package=self._package, graph=self._path.stem, problem=self._log.last_problem)
