"""Run a benchmark: all entries take turns in one process, on the same weights and inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import UnsupportedModelError, first_line
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.attach import attach, denoiser_names
from tgate_compile.pipeline.facts import guidance_of
from tgate_compile.pipeline.optimized import state_of
from tgate_compile.study.bench.measure import (
    Timed,
    cost_of_last,
    machine_of,
    macs_counted,
    peak_memory,
    timed_generation,
    twin_of,
)
from tgate_compile.study.bench.methods import ComparedMethod, Peer, Ready, why_not, with_private_class
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.tuning.request import setting_of

logger = logging.getLogger(__name__)

#: Called before each generation with the number done, the expected total, and a description of the next one.
Progress = Callable[[int, int, str], None]

PLAIN = "plain"
COMPILED = "plain_compiled"

#: The backend `inductor` with CUDA graphs.
CUDA_GRAPHS = "inductor_cuda_graphs"

#: A step that no generation reaches: guidance never ends, to measure the effect of a backend alone.
_NEVER = 100_000

MSG_NO_TIME = "skipped: the time limit of this benchmark was reached"


@dataclass(frozen=True)
class Entry:
    """A way to run the pipeline.

    Attributes:
        row: the row to fill with measurements.
        prepare: prepares a twin of the plain pipeline.
        method: the compared method, if the entry runs one of this library's.
    """

    row: BenchmarkRow
    prepare: Callable[[Any], Ready]
    method: ComparedMethod | None = None


@dataclass(frozen=True)
class Task:
    """The generation that every entry runs.

    Attributes:
        call: arguments of the pipeline's call, including `num_inference_steps`.
        steps: number of denoising steps.
        gate: first gated step.
        repeat: number of timed images, after the first.
        seed: seed of the noise.
        precision: dtype that the optimized entries compute in; `auto` is the pipeline's own.
        until: time on the clock `time.monotonic()` after which no further entry is started; None for no limit.
    """

    call: Mapping[str, Any]
    steps: int
    gate: int
    repeat: int = 5
    seed: int = 0
    precision: str = "auto"
    until: float | None = None


@dataclass
class _Runner:
    entry: Entry
    pipe: Any
    ready: Ready


def entries_for(
    methods: Sequence[ComparedMethod],
    backends: Sequence[str],
    peers: Sequence[Peer],
    *,
    gate: int,
    precision: str = "auto",
) -> list[Entry]:
    """Return entries for the plain pipeline, each backend alone, each schedule on each backend, and the peers."""
    entries = [Entry(BenchmarkRow(PLAIN, "plain", "", PLAIN), Ready)]
    baselines = {"eager": PLAIN}
    for backend in backends:
        if backend == "inductor":
            baselines[backend] = COMPILED
            entries.append(Entry(BenchmarkRow(COMPILED, "plain, torch.compile", "", PLAIN), compiled))
        elif backend == CUDA_GRAPHS:
            baselines[backend] = f"{COMPILED}_cuda_graphs"
            row = BenchmarkRow(baselines[backend], "plain, torch.compile, CUDA graphs", "", PLAIN)
            entries.append(Entry(row, partial(compiled, mode="reduce-overhead")))
        elif backend != "eager":
            baselines[backend] = f"plain_{backend}"
            row = BenchmarkRow(baselines[backend], f"plain, {backend}", backend, PLAIN)
            entries.append(Entry(row, _optimized(Schedule(None, guidance_step=_NEVER), backend, precision)))
    for method in methods:
        for backend in backends if method.schedule is not None else ():
            assert method.schedule is not None
            title = f"{method.title}, {backend.replace('_', ', ', 1).replace('cuda_graphs', 'CUDA graphs')}"
            row = BenchmarkRow(f"{method.key}_{backend}", title, backend, baselines[backend])
            entries.append(Entry(row, _optimized(method.schedule, backend, precision), method))
    for peer in peers:
        title = " ".join(peer.title.format(version=peer.version or "").split()).replace(" ,", ",")
        entries.append(Entry(BenchmarkRow(peer.key, title, "", PLAIN), _changed_by(peer, gate)))
    return entries


def compiled(pipe: Any, mode: str | None = None, backend: str = "inductor") -> Ready:
    """Compile the denoisers of a twin with torch.compile, for the sizes of each call.

    By default Dynamo compiles code that it has seen with other sizes for free sizes, which is slower.
    """
    for name in denoiser_names(pipe):
        module = torch.compile(getattr(pipe, name), fullgraph=True, dynamic=False, mode=mode, backend=backend)
        setattr(pipe, name, module)
    return Ready(pipe)


def _optimized(schedule: Schedule, backend: str, precision: str) -> Callable[[Any], Ready]:
    engine: dict[str, Any] = {"backend": backend, "precision": precision}
    if backend == CUDA_GRAPHS:
        engine |= {"backend": "inductor", "backend_options": {"cuda_graphs": True}}

    def prepare(pipe: Any) -> Ready:
        attach(pipe, dict.fromkeys(denoiser_names(pipe), schedule), **engine)
        return Ready(pipe)

    return prepare


def _changed_by(peer: Peer, gate: int) -> Callable[[Any], Ready]:
    def prepare(pipe: Any) -> Ready:
        if peer.version is None:
            raise UnsupportedModelError(f"{peer.package} is not installed")
        return peer.prepare(with_private_class(pipe), gate)

    return prepare


def run_benchmark(
    pipe: DiffusionPipeline,
    task: Task,
    methods: Sequence[ComparedMethod],
    backends: Sequence[str],
    peers: Sequence[Peer],
    *,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure the plain pipeline `pipe` with all methods, backends and peers. The pipeline itself is not changed.

    An entry that fails gets a row with its error.
    """
    return _Running(pipe, task, methods, backends, peers, progress).run()


def to_channels_last(pipe: Any) -> None:
    """Convert the denoisers to the memory format in which convolutions are fastest on GPUs."""
    for name in denoiser_names(pipe):
        torch.nn.Module.to(getattr(pipe, name), memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Running:
    def __init__(
        self,
        pipe: DiffusionPipeline,
        task: Task,
        methods: Sequence[ComparedMethod],
        backends: Sequence[str],
        peers: Sequence[Peer],
        progress: Progress | None,
    ) -> None:
        self._pipe = pipe
        self._task = task
        self._methods = methods
        self._entries = entries_for(methods, backends, peers, gate=task.gate, precision=task.precision)
        self._denoisers = {name: getattr(pipe, name) for name in denoiser_names(pipe)}
        self._progress = progress
        self._done = 0
        self._guided = True

    def run(self) -> Benchmark:
        task = self._task
        if any(entry.row.key.startswith(COMPILED) for entry in self._entries):
            torch._dynamo.reset()  # forget another model's code, so that this one's is compiled like the first
        runners = [runner for entry in self._entries if (runner := self._prepare(entry)) is not None]
        try:
            for turn in range(task.repeat):
                # The order changes in each round, so that a busy moment does not affect one entry alone.
                for place in range(len(runners)):
                    self._time(runners[(turn + place) % len(runners)])
        finally:
            for runner in runners:
                runner.ready.undo()
        rows = tuple(entry.row for entry in self._entries)
        for row in rows:
            if row.key.startswith(COMPILED) and row.error is None:
                row.macs = rows[0].macs  # the same operations
        return Benchmark(
            setting_of(self._pipe, self._denoisers), machine_of(self._pipe.device), task.steps, task.gate, rows
        )

    def _prepare(self, entry: Entry) -> _Runner | None:
        """Prepare an entry, run its first image, and measure memory and operations; return None if it fails."""
        row = entry.row
        row.error = self._why_not(entry.method)
        if row.error is not None:
            return None
        try:
            pipe = twin_of(self._pipe)
            ready = entry.prepare(pipe)
            runner = _Runner(entry, pipe, ready)
            row.first_seconds = self._generate(runner, "first call").seconds
            if row.key == PLAIN:
                self._guided = guidance_of(pipe, self._task.call)()
            self._measure(runner)
        except Exception as error:  # report the error in the row, and run the other entries
            logger.info("%s failed", row.title, exc_info=True)
            row.error = first_line(error, named=True)
            return None
        return runner

    def _why_not(self, method: ComparedMethod | None) -> str | None:
        if self._task.until is not None and time.monotonic() > self._task.until:
            return MSG_NO_TIME
        if method is None:
            return None
        return why_not(method, self._methods, self._denoisers, steps=self._task.steps, guided=self._guided)

    def _measure(self, runner: _Runner) -> None:
        """Measure memory and operations with an additional image, which is not timed."""
        row = runner.entry.row
        if state_of(runner.pipe) is not None:
            with peak_memory(self._pipe.device) as peak:
                self._generate(runner, "memory")
            cost = cost_of_last(runner.pipe)
            row.macs, row.strip, row.cache_bytes = cost.macs, cost.strip, cost.cache_bytes
        elif row.key.startswith(COMPILED):
            with peak_memory(self._pipe.device) as peak:
                self._generate(runner, "memory")
        else:
            denoisers = {name: getattr(runner.pipe, name) for name in self._denoisers}
            with peak_memory(self._pipe.device) as peak, macs_counted(denoisers) as count:
                self._generate(runner, "memory, operations")
            row.macs = count.macs
        row.peak_bytes = peak.total if self._pipe.device.type == "cuda" else peak.added

    def _time(self, runner: _Runner) -> None:
        row = runner.entry.row
        timed = self._generate(runner, "image")
        row.seconds.append(timed.seconds)
        row.steps.append(list(timed.steps))
        calls, method = len(timed.steps), runner.entry.method
        schedule = None if method is None else method.schedule
        own = None if schedule is None or schedule.gate_step is None else schedule.gate(self._task.steps)
        gate = (self._task.gate if own is None else own) * calls // self._task.steps
        early = range(1, gate)  # the first step includes the text encoder
        late = range(gate, calls)
        if early:
            row.early.append(median(timed.steps[call] for call in early))
        if late:
            row.late.append(median(timed.steps[call] for call in late))

    def _generate(self, runner: _Runner, what: str) -> Timed:
        total = len(self._entries) * (2 + self._task.repeat)
        if self._progress is not None:
            self._progress(self._done, total, f"{runner.entry.row.title}: {what}")
        self._done += 1
        return timed_generation(runner.pipe, self._task.call, self._task.seed, runner.ready.generate)
