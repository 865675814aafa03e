"""The parts of CUDA graphs that can be tested on a CPU; see tests/test_gpu.py for the rest."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import BackendError, ConfigurationError, optimize
from tgate_compile.exports.inductor import live
from tgate_compile.exports.inductor.live import CudaGraph, GraphMemory, Recording, StaticInputs, without_cuda_graphs


def test_inputs_are_copied_to_fixed_addresses_and_cached_values_once() -> None:
    latents, timestep, cached = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 16, 8)
    static = StaticInputs([latents.transpose(1, 2), timestep, cached], cached=1)
    addresses = [buffer.data_ptr() for buffer in static.buffers]
    assert torch.equal(static.buffers[0], latents.transpose(1, 2))
    assert static.fill([latents.transpose(1, 2), timestep, cached]) == 2  # it has the cached value from the beginning
    other = torch.randn(2, 4, 8, 8).transpose(1, 2)
    assert static.fill([other, torch.tensor(6), cached]) == 2
    assert torch.equal(static.buffers[0], other)
    assert static.buffers[0].is_contiguous()
    assert int(static.buffers[1]) == 6
    # Another generation's value, even at the address of the first one.
    assert static.fill([other, timestep, cached + 1]) == 3
    assert torch.equal(static.buffers[2], cached + 1)
    assert [buffer.data_ptr() for buffer in static.buffers] == addresses


def test_a_buffer_keeps_no_cached_value_alive() -> None:
    static = StaticInputs([torch.zeros(3)], cached=1)
    for value in range(3):  # each is freed before the next is made, which may get its address
        assert static.fill([torch.full((3,), float(value))]) == 1
        assert torch.equal(static.buffers[0], torch.full((3,), float(value)))


def test_options_are_checked() -> None:
    pipe = stable_diffusion(layout="small")
    with pytest.raises(ConfigurationError, match="must be True or False, but got 1"):
        optimize(pipe, 2, backend="inductor", backend_options={"cuda_graphs": 1})
    with pytest.raises(ConfigurationError, match="exclude each other"):
        optimize(pipe, 2, backend="inductor", backend_options={"cuda_graphs": True, "triton.cudagraphs": True})


def test_a_cpu_has_no_cuda_graphs() -> None:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="inductor", backend_options={"cuda_graphs": True})
    with pytest.raises(BackendError, match="these are on cpu"):
        run(pipe)


def test_buffers_of_inference_mode_can_be_written_to_outside_of_it() -> None:
    with torch.inference_mode():
        static = StaticInputs([torch.zeros(3), torch.zeros(2)], cached=1)
    static.fill([torch.ones(3), torch.ones(2)])
    with torch.inference_mode():
        static.fill([torch.full((3,), 2.0), torch.full((2,), 2.0)])
    assert [float(buffer.sum()) for buffer in static.buffers] == [6.0, 4.0]
    assert not any(buffer.is_inference() for buffer in static.buffers)


def test_tensors_of_all_kinds_are_copied_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [torch.randn(4, 6), torch.randn(6, 4).T, torch.tensor(3), torch.randn(2).bfloat16(), torch.randn(5)]
    targets = [torch.empty(source.shape, dtype=source.dtype) for source in sources]
    copied: list[int] = []
    own = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (copied.append(len(to)), own(to, of)))
    live.copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert sorted(copied) == [1, 1, 1, 2]  # a transposed tensor, or one of another dtype, does not slow the others down


# Recording, with a stand-in for torch.cuda.


class Replay:
    """What a CUDA graph does when it is replayed: the same work on the same memory."""

    def __init__(self, work: Callable[[], Sequence[torch.Tensor]], outputs: list[torch.Tensor]) -> None:
        self._work = work
        self._outputs = outputs

    def replay(self) -> None:
        for output, value in zip(self._outputs, self._work(), strict=True):
            output.copy_(value)


class MemoryOnCpu(GraphMemory):
    """Records work on the CPU, and counts recordings."""

    def __init__(self) -> None:
        self.recordings = 0

    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        self.recordings += 1
        outputs = [output.clone() for output in run()]
        return Recording(outputs, Replay(run, outputs))


def scaled(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [weights[0] * inputs[0] + inputs[1], inputs[0] - 1]


def test_replays_follow_inputs_and_weights() -> None:
    memory = MemoryOnCpu()
    graph = CudaGraph(scaled, 1, memory)
    weight, cached = torch.tensor(2.0), torch.ones(3)
    weights = [weight]

    def results(value: float, weights: list[torch.Tensor]) -> list[float]:
        outputs = graph(weights, [torch.full((3,), value), cached])
        return [float(output[0]) for output in outputs]

    first = graph(weights, [torch.full((3,), 1.0), cached])
    assert results(5.0, weights) == [11.0, 4.0]
    assert [float(output[0]) for output in first] == [3.0, 0.0]  # not overwritten
    weight.fill_(3.0)  # in place
    assert results(5.0, [weight]) == [16.0, 4.0]
    assert memory.recordings == 1
    with without_cuda_graphs():
        assert results(5.0, [weight]) == [16.0, 4.0]
    assert results(5.0, [torch.tensor(4.0)]) == [21.0, 4.0]  # at another address
    assert memory.recordings == 2
    graph.release()
    assert results(5.0, [torch.tensor(4.0)]) == [21.0, 4.0]
    assert memory.recordings == 3


def test_the_old_outputs_are_free_before_the_next_recording() -> None:
    alive: list[bool] = []
    outputs: list[weakref.ref[torch.Tensor]] = []

    class Watching(MemoryOnCpu):
        def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> Recording:
            alive.extend(output() is not None for output in outputs)
            recording = super().record(run)
            outputs[:] = [weakref.ref(output) for output in recording.outputs]
            return recording

    graph = CudaGraph(scaled, 0, Watching())
    for value in (1.0, 2.0):
        graph([torch.tensor(value)], [torch.ones(3), torch.ones(3)])
    assert alive == [False, False]


def test_weights_are_compared_when_a_generation_begins_and_not_in_a_step() -> None:
    """`optimize` passes the new list to the runner in advance; a step then only sees the same list again."""
    memory = MemoryOnCpu()
    graph = CudaGraph(scaled, 0, memory)
    inputs = [torch.ones(3), torch.ones(3)]
    graph([torch.tensor(2.0)], inputs)
    moved = [torch.tensor(3.0)]
    graph.prepare(moved)
    assert graph._recording is None
    graph(moved, inputs)
    assert memory.recordings == 2


def test_runners_get_the_weights_of_a_generation_in_advance() -> None:
    pipe = optimize(stable_diffusion(layout="small"), 2, backend="eager")
    run(pipe)
    store = pipe._tgate_compile.hook.store
    seen = []
    for compiled in store.compiled:
        compiled.runner._runner = Prepared(compiled.runner._runner, seen)
    store.refresh()
    assert [id(weights) for weights in seen] == [id(compiled.step_weights) for compiled in store.compiled]
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight.detach().clone())
    store.refresh()
    assert [id(weights) for weights in seen[2:]] == [id(compiled.step_weights) for compiled in store.compiled]
    assert any(tensor is pipe.unet.conv_in.weight for tensor in seen[2])


class Prepared:
    """A runner that notes which weights it is prepared for."""

    def __init__(self, runner: Any, seen: list[Sequence[torch.Tensor]]) -> None:
        self._runner = runner
        self._seen = seen

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        result: Sequence[torch.Tensor] = self._runner(weights, inputs)
        return result

    def prepare(self, weights: Sequence[torch.Tensor]) -> None:
        self._seen.append(weights)


@dataclasses.dataclass
class Stream:
    log: list[str]
    name: str

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Cuda:
    """Notes the calls of `torch.cuda` that a recording makes, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._streams = [Stream(self.log, "current")]
        self.pools = 0

    class Pool:
        id = (7, 0)

    def MemPool(self) -> Any:  # noqa: N802
        self.pools += 1
        return self.Pool()

    def Stream(self) -> Stream:  # noqa: N802
        self.log.append("new stream")
        return Stream(self.log, "side")

    def CUDAGraph(self) -> str:  # noqa: N802
        return "a graph"

    def current_stream(self) -> Stream:
        return self._streams[-1]

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        yield
        self._streams.pop()

    @contextmanager
    def graph(self, graph: str, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert self._streams == [Stream(self.log, "current")]
        self.log.append(f"record on {stream.name} in pool {pool}, {capture_error_mode}")
        yield
        self.log.append("recorded")


class LoggingMemory(GraphMemory):
    def clear_workspaces(self) -> None:
        self._cuda.log.append("clear")


def test_the_order_of_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_side_streams", {})
    cuda = Cuda()
    device = torch.device("cuda", 0)
    memory, second = LoggingMemory(device, cuda), LoggingMemory(device, cuda)
    assert cuda.log == ["new stream"]  # one for both
    assert cuda.pools == 2
    cuda.log.clear()

    def work() -> list[torch.Tensor]:
        cuda.log.append(f"run on {cuda.current_stream().name}")
        return [torch.ones(1)]

    recording = memory.record(work)
    assert recording.graph == "a graph"
    assert len(recording.outputs) == 1
    assert cuda.log == [
        "side waits for current",
        "run on side",
        "run on side",
        "current waits for side",
        "clear",
        "record on side in pool (7, 0), thread_local",
        "run on current",
        "recorded",
        "clear",
    ]
    cuda.log.clear()

    def failing() -> list[torch.Tensor]:
        if "clear" in cuda.log:
            raise RuntimeError("out of memory")
        return [torch.ones(1)]

    with pytest.raises(RuntimeError, match="out of memory"):
        second.record(failing)
    assert cuda.log[-1] == "clear"
