"""Inductor as a backend, with CUDA graphs on a GPU."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tgate_compile._arguments import check_names
from tgate_compile._errors import BackendError, ConfigurationError, first_line
from tgate_compile.engine.backends import Runner
from tgate_compile.engine.traffic import exclusive
from tgate_compile.passes.editing import copy_graph
from tgate_compile.passes.graphs import Variant

#: Runs before the recording: kernels are chosen and libraries set up in the first.
_WARM_UP = 2

MSG_NOT_ON_GPU = (
    "CUDA graphs need all inputs on one CUDA device, and these are on {devices}. Leave the option cuda_graphs out, or "
    'move the pipeline: pipe.to("cuda").'
)


def check_on_gpu(inputs: Sequence[torch.Tensor]) -> None:
    """Raise BackendError unless all `inputs` are where a CUDA graph can read them: it would not see others change."""
    devices = {tensor.device for tensor in inputs}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise BackendError(MSG_NOT_ON_GPU.format(devices=" and ".join(sorted(map(str, devices)))))


class StaticInputs:
    """Buffers at fixed addresses, into which a call's inputs are copied.

    What is cached does not change from step to step, so each value of it is copied once.

    Args:
        inputs: what the buffers are to be like, and hold first.
        cached: how many of them, at the end, are cached values, which nobody changes in place.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], cached: int) -> None:
        self.buffers = [torch.clone(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
        self._first_cached = len(inputs) - cached
        self._held: list[weakref.ref[torch.Tensor] | None] = [None] * len(inputs)

    def fill(self, inputs: Sequence[torch.Tensor]) -> int:
        """Copy `inputs` to the buffers; tell how many had to be copied."""
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
    """A runner's work on a GPU as one CUDA graph, recorded at the first call.

    The weights are read where they are, without a copy; a call that finds others (`pipe.to`, an exchanged parameter)
    records anew. Outputs are copied out of the graph's memory, which the next graph on the same pool overwrites.

    Args:
        run: what is recorded.
        cached: how many of its inputs, at the end, are cached values.
        pool: of `torch.cuda.graph_pool_handle()`, shared by graphs that never run at the same time.
    """

    def __init__(self, run: Runner, cached: int, pool: Any) -> None:
        self._run = run
        self._cached = cached
        self._pool = pool
        self._weights: Sequence[torch.Tensor] = ()
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `run` returns for these."""
        if weights is not self._weights:  # a new list at the beginning of each generation
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
        """Let go of the weights, and of what has been recorded with them."""
        self._weights, self._addresses, self._graph = (), [], None

    @exclusive()  # while a graph is recorded, other threads' work on the GPU makes the recording fail
    def _record(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        # Outside of the graph's own memory, so that nothing else is ever put there.
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


# Where oneDNN is present, Inductor wants every convolution in channels-last and copies the weights there inside the
# graph, in every call, which costs more than the rest gains (docs/evidence/benchmarks.md). Its own cure is to freeze
# the weights, which copies them once and for all: twice the memory, and LoRA changes go unseen.
CPU_OPTIONS: Mapping[str, Any] = {"layout_optimization": False}

#: The one option that is not Inductor's.
CUDA_GRAPHS = "cuda_graphs"


class InductorBackend:
    """Compiles the graph with Inductor directly.

    Not through `torch.compile`: there is nothing for Dynamo to trace in a graph, and without its guards nothing can
    recompile. Weights stay inputs of the compiled code, so that there is no copy of them and changes are seen.

    Options are Inductor's, and `cuda_graphs`: on a GPU each graph is recorded as one CUDA graph, so that a step costs
    one launch instead of one for each kernel.
    """

    name: ClassVar[str] = "inductor"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = {name: value for name, value in options.items() if name != CUDA_GRAPHS}
        self._cuda_graphs = bool(options.get(CUDA_GRAPHS, False))
        self._pool: Any = None  # one for all graphs of a denoiser, which never run at the same time

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        if not isinstance(options.get(CUDA_GRAPHS, False), bool):
            raise ConfigurationError(
                f'The option cuda_graphs of backend "inductor" must be True or False, but got {options[CUDA_GRAPHS]!r}.'
            )
        if options.get(CUDA_GRAPHS) and options.get("triton.cudagraphs"):
            raise ConfigurationError(
                'The options cuda_graphs and triton.cudagraphs of backend "inductor" exclude each other: the '
                "second is Inductor's own, which copies all weights in every step."
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
            except Exception as error:  # a missing C++ compiler, an option's wrong value, Inductor's own bugs
                problem = first_line(error, named=True)
                raise BackendError(
                    f"Inductor could not compile the {variant.phase.name} graph ({problem}). On a CPU it needs a "
                    'C++ compiler, on a GPU Triton. optimize(pipe, backend="eager") runs the same graph without '
                    "compiling it."
                ) from error
        logger.info("compiled the %s graph in %.1f s", variant.phase.name, time.perf_counter() - began)

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            # Compiled code is made for fixed strides: contiguous ones, like the examples.
            outputs: Sequence[torch.Tensor] = compiled(*weights, *(tensor.contiguous() for tensor in inputs))
            return outputs

        if not self._cuda_graphs:
            return run
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(run, len(variant.reused), self._pool)


def _example_inputs(variant: Variant) -> list[Any]:
    """The graph's own fake inputs, not real tensors: for these Inductor's caches are skipped, on disk and in memory."""
    placeholders = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
    first_input = len(variant.weights)
    return [fake if position < first_input else fake.contiguous() for position, fake in enumerate(placeholders)]
