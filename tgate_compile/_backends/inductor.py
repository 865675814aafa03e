"""Compiled by TorchInductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tgate_compile._backends._interface import Runner
from tgate_compile._backends.cuda_graph import CudaGraph, check_on_gpu
from tgate_compile._errors import BackendError, ConfigurationError
from tgate_compile._graphs import Variant
from tgate_compile.passes.copy_graph import copy_graph

logger = logging.getLogger(__name__)

MSG_UNKNOWN_OPTIONS = (
    'backend "inductor" does not know the options {unknown}; torch._inductor.list_options() lists those that it knows.'
)
MSG_SWITCH = 'The option cuda_graphs of backend "inductor" must be True or False, but got {given!r}.'
MSG_TWO_KINDS = (
    'The options cuda_graphs and triton.cudagraphs of backend "inductor" exclude each other: the second is Inductor\'s '
    "own, which copies all weights in every step."
)
MSG_FAILED = (
    "Inductor could not compile the {graph} graph ({problem}). On a CPU it needs a C++ compiler, on a GPU Triton. "
    'optimize(pipe, backend="eager") runs the same graph without compiling it.'
)

# Where oneDNN is present, Inductor wants every convolution in channels-last and copies the weights there inside the
# graph, in every call, which costs more than the rest gains (benchmarks/README.md). Its own cure is to freeze the
# weights, which copies them once and for all: twice the memory, and LoRA changes go unseen.
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
            raise ConfigurationError(MSG_SWITCH.format(given=options[CUDA_GRAPHS]))
        if options.get(CUDA_GRAPHS) and options.get("triton.cudagraphs"):
            raise ConfigurationError(MSG_TWO_KINDS)
        known = [CUDA_GRAPHS, *torch._inductor.list_options()]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigurationError(MSG_UNKNOWN_OPTIONS.format(unknown=unknown))

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
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                raise BackendError(MSG_FAILED.format(graph=variant.phase.name, problem=problem)) from error
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
