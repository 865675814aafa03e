"""Compile graphs live with Inductor, optionally with CUDA graphs."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tgate_compile._errors import BackendError, ConfigurationError, check_names, first_line
from tgate_compile.engine.backends import Runner
from tgate_compile.engine.traffic import exclusive
from tgate_compile.passes.graphs import Variant, copy_graph

#: The number of runs before the recording; the first one chooses kernels and initializes libraries.
_WARM_UP = 2


def check_on_gpu(inputs: Sequence[torch.Tensor]) -> None:
    """Raise BackendError unless all `inputs` are on one GPU: a CUDA graph would not see changes of others."""
    devices = {tensor.device for tensor in inputs}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise BackendError(
            "CUDA graphs need all inputs on one CUDA device, but these are on "
            f"{' and '.join(sorted(map(str, devices)))}. Leave the option cuda_graphs out, or move the pipeline with "
            'pipe.to("cuda").'
        )


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each of `sources` to the target at its position, with few kernels: a step may have 70 caches."""
    groups: dict[Hashable, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        # A single tensor of another dtype or layout would make PyTorch copy the whole group one by one.
        alike = target.dtype, source.dtype, source.device, source.stride() == target.stride()
        group = groups.setdefault(alike, ([], []))
        group[0].append(target)
        group[1].append(source)
    for group in groups.values():
        torch._foreach_copy_(*group)


class StaticInputs:
    """Buffers at fixed addresses, into which a call's inputs are copied.

    Cached values do not change from step to step, so each one is copied only once.

    Args:
        inputs: the first inputs, which determine the shapes and the first contents of the buffers.
        cached: the number of cached values at the end of `inputs`, which are never changed in place.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], cached: int) -> None:
        # Tensors that are made in inference mode could not be written to outside of it, in a later call.
        with torch.inference_mode(False):
            self.buffers = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in inputs]
        self._first_cached = len(inputs) - cached
        self._held: list[weakref.ref[torch.Tensor] | None] = [None] * len(inputs)
        self.fill(inputs)

    def fill(self, inputs: Sequence[torch.Tensor]) -> int:
        """Copy `inputs` to the buffers, and return how many had to be copied."""
        stale = [
            position
            for position, (held, given) in enumerate(zip(self._held, inputs, strict=True))
            if held is None or held() is not given
        ]
        copy_all([self.buffers[position] for position in stale], [inputs[position] for position in stale])
        for position in stale:
            if position >= self._first_cached:
                self._held[position] = weakref.ref(inputs[position])
        return len(stale)


@dataclass(frozen=True)
class Recording:
    """A recorded CUDA graph, and the tensors that a replay of it writes to."""

    outputs: Sequence[torch.Tensor]
    graph: Any


#: One side stream for each device: cuBLAS keeps a workspace for each stream that it has been used on.
_side_streams: dict[torch.device, Any] = {}


class GraphMemory:
    """The memory pool that the CUDA graphs of a denoiser share, since they never run at the same time.

    The pool must outlive its graphs. PyTorch frees a pool together with its last graph and then refuses the pool's id,
    so the graphs could not be recorded again after the weights have moved.

    Args:
        device: the GPU.
        cuda: `torch.cuda`.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        with cuda.device(device):
            self._pool = cuda.MemPool()
            if device not in _side_streams:
                _side_streams[device] = cuda.Stream()
        self._stream = _side_streams[device]

    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        """Run `run` a few times, and record it as a CUDA graph. Its tensors must stay where they are."""
        cuda, stream = self._cuda, self._stream
        with cuda.device(self._device):
            current = cuda.current_stream()
            stream.wait_stream(current)
            with cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run()
            current.wait_stream(stream)
            graph = cuda.CUDAGraph()
            # A workspace that the runs above have left behind is outside of the pool, and may be freed at any time;
            # the graph would go on writing to it. One from the recording belongs to the pool, where the next graph
            # uses it as well.
            self.clear_workspaces()
            try:
                # Other threads may allocate memory meanwhile, which the mode "global" would not permit.
                with cuda.graph(graph, pool=self._pool.id, stream=stream, capture_error_mode="thread_local"):
                    outputs = list(run())
            finally:
                self.clear_workspaces()
        return Recording(outputs, graph)

    def clear_workspaces(self) -> None:
        """Free the workspaces of cuBLAS."""
        torch._C._cuda_clearCublasWorkspaces()


_direct: ContextVar[bool] = ContextVar("run the graphs directly", default=False)


@contextmanager
def without_cuda_graphs() -> Iterator[None]:
    """Run compiled graphs directly inside the context, instead of replaying their recordings, to compare the two."""
    token = _direct.set(True)
    try:
        yield
    finally:
        _direct.reset(token)


class CudaGraph:
    """A runner that records another runner as one CUDA graph at the first call, and then replays it.

    The weights are read in place, without a copy; if their addresses change (`pipe.to`, a replaced parameter), the next
    call records again. Outputs are copied out of the graph's memory, which the next graph on the same pool overwrites.

    Args:
        run: the runner to record.
        cached: the number of cached values at the end of its inputs.
        memory: records the graph; shared by graphs that never run at the same time.
    """

    def __init__(self, run: Runner, cached: int, memory: GraphMemory) -> None:
        self._run = run
        self._cached = cached
        self._memory = memory
        self._weights: Sequence[torch.Tensor] = ()
        self._addresses: list[int] = []
        self._inputs: StaticInputs | None = None
        self._recording: Recording | None = None

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the outputs of `run` for these weights and inputs."""
        if _direct.get():
            return self._run(weights, inputs)
        self.prepare(weights)
        if self._recording is None:
            self._record(weights, inputs)
        assert self._recording is not None
        assert self._inputs is not None
        self._inputs.fill(inputs)
        self._recording.graph.replay()
        outputs = [torch.empty_like(output) for output in self._recording.outputs]
        copy_all(outputs, self._recording.outputs)
        return outputs

    def prepare(self, weights: Sequence[torch.Tensor]) -> None:
        """Check the addresses of `weights`. Called when a generation begins, so that no step needs to do it."""
        if weights is self._weights:  # each generation starts with a new list
            return
        addresses = [weight.data_ptr() for weight in weights]
        if addresses != self._addresses:
            self._forget()
        self._weights, self._addresses = weights, addresses

    def release(self) -> None:
        """Release the weights and the graph that was recorded with them."""
        self._weights, self._addresses = (), []
        self._forget()

    def _forget(self) -> None:
        # The tensors are in the pool; while one of them exists, a new recording cannot use its memory.
        self._recording = self._inputs = None

    @exclusive()  # other threads must not use the pool's graphs or capture anything meanwhile
    def _record(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        # Allocated outside the graph's memory pool, so that no other graph reuses this memory.
        static = self._inputs = StaticInputs(inputs, self._cached)
        self._recording = self._memory.record(lambda: self._run(weights, static.buffers))


logger = logging.getLogger(__name__)


# With oneDNN, Inductor converts every convolution to channels-last and copies the weights inside the graph, in every
# call, which costs more than the rest gains (docs/evidence/benchmarks.md). Its own remedy is to freeze the weights,
# which copies them once and for all: this doubles the memory, and changes by LoRAs go unnoticed.
CPU_OPTIONS: Mapping[str, Any] = {"layout_optimization": False}

#: The only option that is not one of Inductor's.
CUDA_GRAPHS = "cuda_graphs"


class InductorBackend:
    """A backend that compiles graphs with Inductor directly.

    It does not use `torch.compile`: Dynamo has nothing to trace in a graph, and without its guards nothing is ever
    recompiled. Weights stay inputs of the compiled code, so they are not copied, and changes take effect.

    The options are those of Inductor and `cuda_graphs`, which records each graph as one CUDA graph on a GPU, so that a
    step needs one launch instead of one per kernel.
    """

    name: ClassVar[str] = "inductor"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = {name: value for name, value in options.items() if name != CUDA_GRAPHS}
        self._cuda_graphs = bool(options.get(CUDA_GRAPHS, False))
        self._memory: GraphMemory | None = None

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        if not isinstance(options.get(CUDA_GRAPHS, False), bool):
            raise ConfigurationError(
                f'cuda_graphs of backend "inductor" must be True or False, but got {options[CUDA_GRAPHS]!r}.'
            )
        if options.get(CUDA_GRAPHS) and options.get("triton.cudagraphs"):
            raise ConfigurationError(
                'The options cuda_graphs and triton.cudagraphs of backend "inductor" exclude each other. Leave out '
                "triton.cudagraphs, Inductor's own implementation, which copies all weights in every step."
            )
        known = [CUDA_GRAPHS, *torch._inductor.list_options()]
        check_names(options, known, 'backend="inductor"', source="torch._inductor.list_options()")

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return None

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        began = time.perf_counter()
        on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
        if self._cuda_graphs:
            check_on_gpu(inputs)
        options = {**(CPU_OPTIONS if on_cpu else {}), **self._options}
        graph_module = copy_graph(variant.program.graph_module)  # Inductor rewrites what it is given
        with torch.no_grad():
            try:
                compiled = torch._inductor.compile(graph_module, _example_inputs(variant), options=options)
            except Exception as error:  # a missing C++ compiler, an invalid option, a bug in Inductor
                problem = first_line(error, named=True)
                raise BackendError(
                    f"Inductor could not compile the {variant.phase.name} graph ({problem}). On a CPU it needs a "
                    'C++ compiler, on a GPU Triton. optimize(pipe, backend="eager") runs the same graph without '
                    "compiling it."
                ) from error
        logger.info("compiled the %s graph in %.1f s", variant.phase.name, time.perf_counter() - began)

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            # Compiled code expects fixed strides: contiguous ones, like those of the examples.
            outputs: Sequence[torch.Tensor] = compiled(*weights, *(tensor.contiguous() for tensor in inputs))
            return outputs

        if not self._cuda_graphs:
            return run
        if self._memory is None:
            self._memory = GraphMemory(inputs[0].device)
        return CudaGraph(run, len(variant.reused), self._memory)


def _example_inputs(variant: Variant) -> list[Any]:
    """Return the graph's own fake inputs: with real tensors Inductor would skip its caches, on disk and in memory."""
    placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
    first_input = len(variant.weights)
    return [fake if position < first_input else fake.contiguous() for position, fake in enumerate(placeholders)]
