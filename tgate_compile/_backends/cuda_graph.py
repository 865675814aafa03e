"""CUDA graphs: a runner's kernels, recorded once and started again with one call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from tgate_compile._backends._interface import Runner
from tgate_compile._errors import BackendError
from tgate_compile._traffic import exclusive

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
