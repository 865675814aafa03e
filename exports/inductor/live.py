"""Compile graphs live with Inductor, optionally with CUDA graphs."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
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


class StaticInputs:
    """Buffers at fixed addresses, into which a call's inputs are copied.

    Cached values do not change from step to step, so each one is copied only once.

    Args:
        inputs: the first inputs, which determine the shapes of the buffers.
        cached: the number of cached values at the end of `inputs`, which are never changed in place.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], cached: int) -> None:
        self.buffers = [torch.clone(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
        self._first_cached = len(inputs) - cached
        self._held: list[weakref.ref[torch.Tensor] | None] = [None] * len(inputs)

    def fill(self, inputs: Sequence[torch.Tensor]) -> int:
        """Copy `inputs` to the buffers, and return how many had to be copied."""
        copied = 0
        for position, (buffer, given) in enumerate(zip(self.buffers, inputs, strict=True)):
            held = self._held[position]
            if held is not None and held() is given:
                continue
            buffer.copy_(given)
            copied += 1
            if position >= self._first_cached:
                self._held[position] = weakref.ref(given)
        return copied


class CudaGraph:
    """A runner that records another runner as one CUDA graph at the first call, and then replays it.

    The weights are read in place, without a copy; if their addresses change (`pipe.to`, a replaced parameter), the next
    call records again. Outputs are copied out of the graph's memory, which the next graph on the same pool overwrites.

    Args:
        run: the runner to record.
        cached: the number of cached values at the end of its inputs.
        pool: a handle from `torch.cuda.graph_pool_handle()`, shared by graphs that never run at the same time.
    """

    def __init__(self, run: Runner, cached: int, pool: Any) -> None:
        self._run = run
        self._cached = cached
        self._pool = pool
        self._weights: Sequence[torch.Tensor] = ()
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs of `run` for these weights and inputs."""
        if weights is not self._weights:  # each generation starts with a new list
            addresses = [weight.data_ptr() for weight in weights]
            if addresses != self._addresses:
                self._graph = None
            self._weights, self._addresses = weights, addresses
        if self._graph is None:
            self._record(weights, inputs)
            assert self._graph is not None
        self._inputs.fill(inputs)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def release(self) -> None:
        """Release the weights and the graph that was recorded with them."""
        self._weights, self._addresses, self._graph = (), [], None

    @exclusive()  # while a graph is recorded, other threads' work on the GPU makes the recording fail
    def _record(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        # Allocated outside the graph's memory pool, so that no other graph reuses this memory.
        self._inputs = StaticInputs(inputs, self._cached)
        with torch.cuda.device(inputs[0].device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    self._run(weights, self._inputs.buffers)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._outputs = list(self._run(weights, self._inputs.buffers))
        self._graph = graph


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
        self._pool: Any = None  # shared by all graphs of a denoiser, which never run at the same time

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
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(run, len(variant.reused), self._pool)


def _example_inputs(variant: Variant) -> list[Any]:
    """Return the graph's own fake inputs: with real tensors Inductor would skip its caches, on disk and in memory."""
    placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
    first_input = len(variant.weights)
    return [fake if position < first_input else fake.contiguous() for position, fake in enumerate(placeholders)]
