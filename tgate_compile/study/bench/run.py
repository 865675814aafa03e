"""Times contenders side by side: one process, the same weights and inputs, in turns."""

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

from tgate_compile._errors import UnsupportedModelError
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
)
from tgate_compile.study.bench.methods import Method, Peer, Ready, of_its_own_class, why_not
from tgate_compile.study.bench.result import Benchmark, Row
from tgate_compile.study.bench.twin import twin_of
from tgate_compile.study.tuning.request import setting_of

logger = logging.getLogger(__name__)

#: Called before each generation: how many are done, how many there will be as far as is known, and what comes now.
Progress = Callable[[int, int, str], None]

PLAIN = "plain"
COMPILED = "plain_compiled"

#: The backend `inductor` with CUDA graphs.
CUDA_GRAPHS = "inductor_cuda_graphs"

#: A gate that no generation reaches: what a backend brings by itself.
_NEVER = 100_000

MSG_NO_TIME = "left out: the time for this benchmark was over"


@dataclass(frozen=True)
class Contender:
    """A row to be, and how its pipeline is made from a twin of the plain one."""

    row: Row
    prepare: Callable[[Any], Ready]
    method: Method | None = None


@dataclass(frozen=True)
class Task:
    """What every contender is asked for.

    Attributes:
        call: arguments of the pipeline's call, `num_inference_steps` included.
        steps: denoising steps.
        gate: the first gated step.
        repeat: images that are timed, after the first.
        seed: of the noise.
        until: when no contender is begun any more, by `time.monotonic()`; None: all are.
    """

    call: Mapping[str, Any]
    steps: int
    gate: int
    repeat: int = 5
    seed: int = 0
    until: float | None = None


@dataclass
class _Runner:
    contender: Contender
    pipe: Any
    ready: Ready


def contenders_for(
    methods: Sequence[Method], backends: Sequence[str], peers: Sequence[Peer], *, gate: int
) -> list[Contender]:
    """The plain pipeline; each backend by itself; each schedule on each backend; the peers."""
    contenders = [Contender(Row(PLAIN, "plain", "", PLAIN), Ready)]
    baselines = {"eager": PLAIN}
    for backend in backends:
        if backend == "inductor":
            baselines[backend] = COMPILED
            contenders.append(Contender(Row(COMPILED, "plain, torch.compile", "", PLAIN), _compiled))
        elif backend == CUDA_GRAPHS:
            baselines[backend] = f"{COMPILED}_cuda_graphs"
            row = Row(baselines[backend], "plain, torch.compile, CUDA graphs", "", PLAIN)
            contenders.append(Contender(row, partial(_compiled, mode="reduce-overhead")))
        elif backend != "eager":
            baselines[backend] = f"plain_{backend}"
            row = Row(baselines[backend], f"plain, {backend}", backend, PLAIN)
            contenders.append(Contender(row, _optimized(Schedule(_NEVER), backend)))
    for method in methods:
        for backend in backends if method.schedule is not None else ():
            assert method.schedule is not None
            title = f"{method.title}, {backend.replace('_', ', ', 1).replace('cuda_graphs', 'CUDA graphs')}"
            row = Row(f"{method.key}_{backend}", title, backend, baselines[backend])
            contenders.append(Contender(row, _optimized(method.schedule, backend), method))
    for peer in peers:
        title = " ".join(peer.title.format(version=peer.version or "").split()).replace(" ,", ",")
        contenders.append(Contender(Row(peer.key, title, "", PLAIN), _changed_by(peer, gate)))
    return contenders


def _compiled(pipe: Any, mode: str | None = None) -> Ready:
    for name in denoiser_names(pipe):
        setattr(pipe, name, torch.compile(getattr(pipe, name), fullgraph=True, mode=mode))
    return Ready(pipe)


def _optimized(schedule: Schedule, backend: str) -> Callable[[Any], Ready]:
    engine: dict[str, Any] = {"backend": backend}
    if backend == CUDA_GRAPHS:
        engine = {"backend": "inductor", "backend_options": {"cuda_graphs": True}}

    def prepare(pipe: Any) -> Ready:
        attach(pipe, dict.fromkeys(denoiser_names(pipe), schedule), **engine)
        return Ready(pipe)

    return prepare


def _changed_by(peer: Peer, gate: int) -> Callable[[Any], Ready]:
    def prepare(pipe: Any) -> Ready:
        if peer.version is None:
            raise UnsupportedModelError(f"{peer.package} is not installed")
        return peer.prepare(of_its_own_class(pipe), gate)

    return prepare


def run_benchmark(
    pipe: DiffusionPipeline,
    task: Task,
    methods: Sequence[Method],
    backends: Sequence[str],
    peers: Sequence[Peer],
    *,
    progress: Progress | None = None,
) -> Benchmark:
    """Time `pipe`, which is plain and stays so, in every way that is asked for.

    What cannot run is a row with its error.
    """
    return _Running(pipe, task, methods, backends, peers, progress).run()


def to_channels_last(pipe: Any) -> None:
    """Put the denoisers' convolutions into the layout that GPUs are fastest with."""
    for name in denoiser_names(pipe):
        torch.nn.Module.to(getattr(pipe, name), memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Running:
    def __init__(
        self,
        pipe: DiffusionPipeline,
        task: Task,
        methods: Sequence[Method],
        backends: Sequence[str],
        peers: Sequence[Peer],
        progress: Progress | None,
    ) -> None:
        self._pipe = pipe
        self._task = task
        self._methods = methods
        self._contenders = contenders_for(methods, backends, peers, gate=task.gate)
        self._denoisers = {name: getattr(pipe, name) for name in denoiser_names(pipe)}
        self._progress = progress
        self._done = 0
        self._guided = True

    def run(self) -> Benchmark:
        task = self._task
        runners = [runner for contender in self._contenders if (runner := self._prepare(contender)) is not None]
        try:
            for turn in range(task.repeat):
                # In another order each time, so that a busy moment hits none of them alone.
                for place in range(len(runners)):
                    self._time(runners[(turn + place) % len(runners)])
        finally:
            for runner in runners:
                runner.ready.undo()
        rows = tuple(contender.row for contender in self._contenders)
        for row in rows:
            if row.key.startswith(COMPILED) and row.error is None:
                row.macs = rows[0].macs  # the same operations
        return Benchmark(
            setting_of(self._pipe, self._denoisers), machine_of(self._pipe.device), task.steps, task.gate, rows
        )

    def _prepare(self, contender: Contender) -> _Runner | None:
        """The contender after its first image, and one whose memory and operations were looked at; None if it fails."""
        row = contender.row
        row.error = self._why_not(contender.method)
        if row.error is not None:
            return None
        try:
            pipe = twin_of(self._pipe)
            ready = contender.prepare(pipe)
            runner = _Runner(contender, pipe, ready)
            row.first_seconds = self._generate(runner, "first call").seconds
            if row.key == PLAIN:
                self._guided = guidance_of(pipe, self._task.call)()
            self._look(runner)
        except Exception as error:  # a contender that cannot run is a row with its error
            logger.info("%s failed", row.title, exc_info=True)
            row.error = f"{type(error).__name__}: {_first_line(error)}"
            return None
        return runner

    def _why_not(self, method: Method | None) -> str | None:
        if self._task.until is not None and time.monotonic() > self._task.until:
            return MSG_NO_TIME
        if method is None:
            return None
        return why_not(method, self._methods, self._denoisers, steps=self._task.steps, guided=self._guided)

    def _look(self, runner: _Runner) -> None:
        """Memory and operations, in an image of its own, which is not timed."""
        row = runner.contender.row
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
        row = runner.contender.row
        timed = self._generate(runner, "image")
        row.seconds.append(timed.seconds)
        row.steps.append(list(timed.steps))
        calls, method = len(timed.steps), runner.contender.method
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
        total = len(self._contenders) * (2 + self._task.repeat)
        if self._progress is not None:
            self._progress(self._done, total, f"{runner.contender.row.title}: {what}")
        self._done += 1
        return timed_generation(runner.pipe, self._task.call, self._task.seed, runner.ready.generate)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
