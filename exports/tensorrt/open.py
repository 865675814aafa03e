"""Run TensorRT engines, with weights that can be replaced and a cache of compiled kernels."""

from __future__ import annotations

import importlib
import logging
import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_compile._errors import BackendError
from tgate_compile.bundle.manifest import Graph
from tgate_compile.bundle.read_manifest import inputs_of, output_shapes, outputs_of
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.exports.tensorrt.convert import DTYPES, parser_errors, tensorrt_log


def onnx_beside(engine: Path) -> Path:
    """Return the path of the ONNX file that names the weights of the file `engine`, if this is stripped of them."""
    return engine.with_suffix(".onnx")


def is_stripped(package: str, engine: Any) -> bool:
    """Return whether the engine has been stripped of its weights."""
    stat = importlib.import_module(package).EngineStat.STRIPPED_WEIGHTS_SIZE
    return bool(engine.get_engine_stat(stat) > 0)


def refit(package: str, engine: Any, model: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace the weights in `engine` by `weights`, by the names of the initializers in the ONNX file `model`.

    All others are taken from the weights file in the same folder. The engine must not be running.

    Raises:
        BackendError: the weights of this engine cannot be replaced, or TensorRT rejects these.
    """
    if not engine.refittable or not model.exists():
        raise BackendError(
            f"The weights of the denoiser have changed, but those of the engine for the {model.stem} graph cannot be "
            'replaced. Export the bundle with format_options={"refit": True}, or call restore(pipe) and '
            "optimize(pipe, ...) for the changed model."
        )
    trt = importlib.import_module(package)
    log = tensorrt_log(package)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    names = _weight_names(model)
    # These tensors must live as long as the refitter.
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name in names}
    done = parser.load_model_proto(model.read_bytes(), str(model))
    done = done and all(parser.load_initializer(name, t.data_ptr(), t.nbytes) for name, t in held.items())
    if not (done and parser.refit_model_proto() and refitter.refit_cuda_engine()):
        problem = parser_errors(parser) or log.last_problem
        raise BackendError(
            f"{package} could not replace the weights in the engine of the {model.stem} graph ({problem})."
        )


def _weight_names(model: Path) -> set[str]:
    import onnx

    graph = onnx.load_model(model, load_external_data=False).graph
    return {tensor.name for tensor in graph.initializer}


#: The package that supports some GPUs only. TensorRT itself builds engines for the present GPU, whichever it is.
_RTX = "tensorrt_rtx"


def supported_capabilities(package: str) -> list[str]:
    """Return the compute capabilities that TensorRT for RTX builds engines for, such as `8.9` for its SM89."""
    members = importlib.import_module(package).ComputeCapability.__members__
    numbers = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]


def check_gpu_supported(package: str, capability: tuple[int, int], gpu: str) -> None:
    """Raise BackendError if the package is TensorRT for RTX and cannot run on GPUs with this compute capability."""
    own = "{}.{}".format(*capability)
    supported = supported_capabilities(package) if package == _RTX else [own]
    if own not in supported:
        raise BackendError(
            f"{package} supports NVIDIA GPUs with the compute capabilities {', '.join(supported)}, but this GPU is "
            f'{gpu}, with {own}. Export the bundle with format="tensorrt", "aoti" or "onnx", which run on it.'
        )


class TensorRTRuntimeCache:
    """A cache of the kernels that TensorRT for RTX compiles for the GPU, in a file if a folder is given for it."""

    def __init__(self, trt: Any, engine: Any, path: Path, folder: object) -> None:
        self._trt = trt
        self._engine = engine
        self._file = None if folder is None else Path(str(folder)) / f"{path.stem}.cache"
        self._cache: Any = None

    def context(self) -> Any:
        """Create an execution context whose memory is provided by the caller."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._file is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache = config.create_runtime_cache()
        if self._file.exists():
            self._cache.deserialize(self._file.read_bytes())  # stays empty if the file is for another GPU or version
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def save(self) -> None:
        """Write the cache to the file."""
        if self._file is not None:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_bytes(self._cache.serialize())
            temporary.replace(self._file)


logger = logging.getLogger(__name__)


class TensorRTSession:
    """A session that runs the engine in the file `path`, which `graph` describes, on the GPU `device`.

    The memory for intermediate values is allocated from torch for each run and freed after it, so the graphs of a
    bundle share it with each other and with everything else that torch runs on the same stream.
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
        check_gpu_supported(package, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
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
        """The name of the package and of the GPU."""
        return f"{self._package} on {torch.cuda.get_device_name(self._device)}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last."""
        context = self._context
        shapes = [tensor.shape for tensor in inputs]
        with torch.cuda.device(self._device):
            outputs = [
                torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
                for spec, shape in zip(outputs_of(self._graph), output_shapes(self._graph, inputs), strict=True)
            ]
            # These must live until the run is enqueued; later tensors that reuse their memory follow it on the stream.
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
            # On the default stream TensorRT would wait for the whole GPU, so it has its own, in the same order.
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            self._need(context.execute_async_v3(self._stream.cuda_stream))
            current.wait_stream(self._stream)
        if shapes != self._shapes:
            self._shapes = shapes
            self._cache.save()
        return outputs

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the engine's weights by `weights`, which has their names in the denoiser; others are the bundle's.

        Raises:
            BackendError: the weights of this engine cannot be replaced, or TensorRT rejects these.
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
            gpu = torch.cuda.get_device_name(self._device)
            raise BackendError(
                f"{self._package} {self._trt.__version__} cannot open the engine of the {self._path.stem} graph "
                f"({self._log.last_problem}). An engine needs the version that built it, and a GPU with a compute "
                f"capability that it was built for; this GPU is {gpu}, with {major}.{minor}."
            )
        return runtime, engine

    def _check(self) -> None:
        """Raise BackendError unless the engine's inputs and outputs have the manifest's names, dtypes and ranks."""
        engine, mode = self._engine, self._trt.TensorIOMode
        expected = [(mode.INPUT, spec) for spec in inputs_of(self._graph)]
        expected += [(mode.OUTPUT, spec) for spec in outputs_of(self._graph)]
        required = {spec.name: (kind.name.lower(), spec.dtype, len(spec.shape)) for kind, spec in expected}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = {
            name: (
                engine.get_tensor_mode(name).name.lower(),
                dtype_name(DTYPES[engine.get_tensor_dtype(name).name]),
                len(engine.get_tensor_shape(name)),
            )
            for name in names
        }
        for name in {**required, **given}:
            if given.get(name) != required.get(name):
                raise BackendError(
                    f"The engine of the {self._path.stem} graph has {(name, given.get(name))}, but the manifest says "
                    f"{(name, required.get(name))}."
                )

    def _need(self, done: bool) -> None:
        if not done:
            raise BackendError(self._failed())

    def _failed(self) -> str:
        return f"{self._package} could not run the {self._path.stem} graph ({self._log.last_problem})."
