"""Measure time, memory and multiply-accumulates of a generation, and describe the machine."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tgate_compile import __version__
from tgate_compile._machine import return_freed_memory
from tgate_compile.pipeline.attach import denoiser_names
from tgate_compile.pipeline.describe import describe
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.tuning.measure import GraphCosts
from tgate_compile.study.tuning.recorder import after_steps, removed


def machine_of(device: torch.device) -> dict[str, str]:
    """Return hardware and versions as plain data."""
    if device.type == "cuda":
        hardware = f"cuda ({torch.cuda.get_device_name(device)})"
    else:
        hardware = f"{device.type} ({processor()}, {torch.get_num_threads()} threads)"
    return {
        "device": hardware,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "tgate_compile": __version__,
    }


def processor() -> str:
    """Return the name of the processor, if the operating system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# Linear and convolution layers, which is the paper's convention. The products inside attention use other operators.
_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count multiply-accumulates in linear and convolution layers while the mode is active.

    PyTorch's FlopCounterMode counts the same, but it also traverses the modules and never terminates if a package has
    made a module a submodule of itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        packet = func._overloadpacket
        if packet in _LAYERS:
            self.macs += flop_registry[packet](*args, **given, out_val=result) / 2
        return result


@contextmanager
def macs_counted(denoisers: Mapping[str, torch.nn.Module]) -> Iterator[Count]:
    """Count the operations of all calls of `denoisers` inside the context. Compiled code cannot be counted."""
    count = Count()
    running = ExitStack()

    def begin(*_: Any) -> None:
        running.enter_context(count)

    def end(*_: Any) -> None:
        running.close()

    with ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(removed(denoiser.register_forward_pre_hook(begin)))
            stack.enter_context(removed(denoiser.register_forward_hook(end, always_call=True)))
        yield count


_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): reset the peak resident set size to its current value


@dataclass
class Peak:
    """The peak memory use of some work in bytes; None if it cannot be measured on this system.

    Attributes:
        total: peak of torch's allocator on a GPU, with the memory pools of CUDA graphs; of the whole process on a CPU.
        added: `total` minus the memory in use before.
    """

    total: int | None = None
    added: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory use inside the context, which slows the work down a little.

    The yielded object is filled in at the end of the context.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = memory_in_use(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.total = torch.cuda.max_memory_allocated(device) + _idle(device)
        peak.added = peak.total - before
        return
    resident = _resident("VmRSS") if _reset_peak() else None
    yield peak
    if resident is not None:
        peak.total = _resident("VmHWM")
        peak.added = max(peak.total - resident, 0)


def memory_in_use(device: torch.device) -> int:
    """Return the number of bytes in use on a GPU, with the memory pools of CUDA graphs; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(device) + _idle(device)


def _idle(device: torch.device) -> int:
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return idle_in_pools(segments, torch.cuda.current_device() if device.index is None else device.index)


def idle_in_pools(segments: Iterable[Mapping[str, Any]], device: int) -> int:
    """Return the number of bytes of the memory pools of CUDA graphs on `device` that count as free.

    A recorded graph uses this memory whenever it is replayed, but nothing is allocated then.

    Args:
        segments: the result of `torch.cuda.memory_snapshot()`.
        device: the index of the device.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == device and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _reset_peak() -> bool:
    return_freed_memory()  # otherwise the work could reuse it without raising the peak
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # not Linux, or not permitted
        return False
    return True


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def twin_of(pipe: DiffusionPipeline) -> Any:
    """Return a copy of the plain pipeline `pipe` with separate denoisers and scheduler, but shared weights.

    Twins can be optimized in different ways and take turns without a second copy of the weights.
    """
    twin = copy.copy(pipe)
    for name in denoiser_names(pipe):
        denoiser = getattr(pipe, name)
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
        setattr(twin, name, copy.deepcopy(denoiser, memo=shared))
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    twin.set_progress_bar_config(disable=True)
    return twin


@dataclass(frozen=True)
class Timed:
    """The output of a generation and its times.

    Attributes:
        output: first element of the pipeline's result, usually its images.
        latents: final latents, [images, ...], float32 on the CPU.
        seconds: time of the whole call.
        steps: time of each scheduler step and the work before it, on the GPU's own timeline if there is one. The first
            one starts with the call and therefore includes the text encoder.
    """

    output: Any
    latents: torch.Tensor
    seconds: float
    steps: tuple[float, ...]


def timed_generation(
    pipe: Any, call: Mapping[str, Any], seed: int, generate: Callable[..., Any] | None = None
) -> Timed:
    """Run `pipe`, or `generate`, which runs it, once, on noise from the CPU, which is the same on every device."""
    device = torch.device(pipe.device)
    latents: list[torch.Tensor] = []
    marks = _DeviceMarks() if device.type == "cuda" else _Marks(device)

    def mark(result: Any) -> None:
        marks.set()
        latents[:] = [result[0]]

    generator = torch.Generator().manual_seed(seed)
    with after_steps(pipe.scheduler, mark):
        _synchronize(device)
        marks.set()
        began = time.perf_counter()
        output = (generate or pipe)(**call, generator=generator, return_dict=False)[0]
        _synchronize(device)
        seconds = time.perf_counter() - began
    return Timed(output, latents[0].detach().to("cpu", torch.float32), seconds, marks.between())


class _Marks:
    """Points in time at which `device` has finished its work. On a GPU, waiting for it would slow it down."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []

    def set(self) -> None:
        _synchronize(self._device)
        self._times.append(time.perf_counter())

    def between(self) -> tuple[float, ...]:
        """Return the seconds between each two marks."""
        return tuple(after - before for before, after in pairwise(self._times))


class _DeviceMarks:
    """Points in the work of the current CUDA device, which takes their times itself: nothing has to wait.

    Args:
        cuda: `torch.cuda`.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._events: list[Any] = []

    def set(self) -> None:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def between(self) -> tuple[float, ...]:
        """Return the seconds between each two marks, once the device has finished its work."""
        return tuple(before.elapsed_time(after) / 1000 for before, after in pairwise(self._events))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Cost:
    """The cost of the denoisers in one generation.

    Attributes:
        macs: multiply-accumulates in linear and convolution layers, which is the paper's convention.
        parameters_at_end: parameters of the largest graph after the gate (without a gate: of all graphs).
        cache_bytes: largest total size of the values kept from one step to the next.
        strip: one character per step.
    """

    macs: float
    parameters_at_end: int
    cache_bytes: int
    strip: str


def cost_of_last(pipe: Any) -> Cost:
    """Return the cost of the last generation of an optimized pipeline."""
    description = describe(pipe)
    macs, parameters = 0.0, 0
    sizes = {(variant.denoiser, variant.name): variant.parameters for variant in description.variants}
    for name, hook in required_state_of(pipe).hooks.items():
        phases = [] if hook.last is None else [phase for _, phase in hook.last.steps]
        if not phases:
            continue
        macs += GraphCosts.of(hook).macs_of(phases)
        gated = [phase for phase in phases if "cross" in phase.reuse] or phases
        # A step that was decided while it ran has no graph of its own; full ones are the largest.
        parameters += max(sizes.get((name, phase.name), 0) for phase in gated)
    return Cost(macs, parameters, description.cache_bytes, description.strip)


def plain_macs(optimized: Any, rows: Mapping[str, int]) -> float:
    """Return the multiply-accumulates of the plain pipeline, from the full graphs of an optimized one.

    Args:
        optimized: an optimized pipeline that has made its full graphs.
        rows: sum of the batch sizes of all calls, by denoiser.
    """
    hooks = required_state_of(optimized).hooks
    return sum(count * GraphCosts.of(hooks[name]).per_row["full"] for name, count in rows.items())
