"""Run all GPU benchmarks with one command, and write the results to one file.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

The denoisers have the sizes of real models and random weights, in bfloat16 and channels-last format. Each generation
has one prompt and 25 steps. The rows come in the order of their worth, and the file is rewritten after each of them, so
that a run that is killed has lost one row. When the time is up, the remaining rows are marked as skipped.

T-GATE's rows share one optimized pipeline: `pipe(..., gate_step=5)` uses the graphs of gate 10, and the rows without
CUDA graphs run the same compiled code directly. Efficiency is the speedup over the plain pipeline that runs in the same
way (compiled, with CUDA graphs, or eager), divided by the ratio of the operations.

`gpu_warm.py` fills Inductor's cache beforehand. Both can be tried without a GPU:

    python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tgate_compile import optimize, restore
from tgate_compile._demo.pipeline import load_demo_pipeline
from tgate_compile._errors import TGateError, first_line
from tgate_compile.engine.backends import backend_class
from tgate_compile.engine.trust import relative_difference
from tgate_compile.exports.inductor.live import without_cuda_graphs
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.attach import denoiser_names
from tgate_compile.pipeline.optimized import preview, required_state_of, state_of
from tgate_compile.study.bench.measure import (
    Timed,
    cost_of_last,
    machine_of,
    macs_counted,
    memory_in_use,
    peak_memory,
    plain_macs,
    timed_generation,
    twin_of,
)
from tgate_compile.study.bench.methods import PEERS, Ready, methods_for, random_pipeline, with_private_class
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.bench.run import MSG_NO_TIME, compiled, to_channels_last
from tgate_compile.study.tuning.request import setting_of

FORMAT = "tgate_compile.gpu"

#: Seconds that must be left for a trace, and the method whose image it shows.
TRACE_SECONDS, TRACED = 60.0, "tgate"

PLAIN, PLAIN_COMPILED, PLAIN_CUDA_GRAPHS = "plain", "plain_compiled", "plain_cuda_graphs"
#: The ways in which a pipeline runs, each with the plain row that it is compared with.
BASELINES = {"eager": PLAIN, "compiled": PLAIN_COMPILED, "cuda_graphs": PLAIN_CUDA_GRAPHS}


@dataclass(frozen=True)
class Contender:
    """A way to make an image.

    Attributes:
        key: identifier for programs.
        title: name for people.
        mode: how the pipeline runs: one of `BASELINES`.
        method: key of this library's method, `PLAIN`, or key of another package's method.
        all_gates: whether it is measured with all gates of a suite, instead of only the first one.
        needs: seconds that must be left to begin it: loading compiled code from a filled cache, and one image.
    """

    key: str
    title: str
    mode: str
    method: str
    all_gates: bool = False
    needs: float = 20.0


#: The most important first.
CONTENDERS = (
    Contender("tgate_cuda_graphs", "T-GATE v1, CUDA graphs", "cuda_graphs", "tgate", all_gates=True, needs=60),
    Contender(PLAIN_COMPILED, "plain, torch.compile", "compiled", PLAIN, needs=40),
    Contender(PLAIN_CUDA_GRAPHS, "plain, torch.compile, reduce-overhead", "cuda_graphs", PLAIN, needs=40),
    Contender(PLAIN, "plain, eager", "eager", PLAIN, needs=15),
    Contender("tgate_compiled", "T-GATE v1, compiled", "compiled", "tgate", all_gates=True),
    Contender(
        "deepcache_tgate_cuda_graphs", "DeepCache + T-GATE, CUDA graphs", "cuda_graphs", "deepcache_tgate", needs=60
    ),
    Contender("tgate_v2_cuda_graphs", "T-GATE v2, CUDA graphs", "cuda_graphs", "tgate_v2", needs=60),
    Contender("tgate_authors", "tgate package, v1", "eager", "tgate_authors"),
    Contender("deepcache_tgate_authors", "tgate package + DeepCache", "eager", "deepcache_tgate_authors"),
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The measurements of one model.

    Attributes:
        name: name of the model.
        build: makes a plain pipeline and the arguments of its call, on a device.
        gates: gate steps, the most important first.
        steps: number of denoising steps.
    """

    name: str
    build: Callable[[torch.device, torch.dtype], tuple[Any, dict[str, Any]]]
    gates: tuple[int, ...]
    steps: int = 25


def _tiny(variant: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return an embedded pipeline in place of a model of real size."""
    pipe = load_demo_pipeline(variant, torch_dtype=dtype).to(device)
    return pipe, {"prompt": "a small red circle", "output_type": "latent"}


_FULL = {name: partial(random_pipeline, name) for name in ("sdxl", "sd15", "pixart_alpha")}
_EMBEDDED = {"sdxl": "sdxl", "sd15": "sd", "pixart_alpha": "pixart"}
_GATES = {"sdxl": (10, 5), "sd15": (10,), "pixart_alpha": (8,)}


def suites_for(names: Sequence[str], *, tiny: bool = False) -> tuple[Suite, ...]:
    """Return the suites of the models `names`; `tiny` replaces the models by embedded ones, and 25 steps by 6."""
    suites = []
    for name in names:
        if tiny:
            gates = tuple(range(3, 3 - len(_GATES[name]), -1))
            suites.append(Suite(name, partial(_tiny, _EMBEDDED[name]), gates, steps=6))
        else:
            suites.append(Suite(name, _FULL[name], _GATES[name]))
    return tuple(suites)


@dataclass(frozen=True)
class Deadline:
    """A point in time, on a clock like `time.monotonic`."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """The number of seconds left; negative afterwards."""
        return self.at - self.clock()


class Bench:
    """The pipelines of one suite, made when they are first needed, on the same weights.

    Args:
        suite: the model.
        device: the device; on a CPU, CUDA graphs are left out.
        dtype: dtype of the weights.
        backend: `inductor`, or `eager` to try the script quickly: then torch.compile does not compile either.
    """

    def __init__(self, suite: Suite, device: torch.device, dtype: torch.dtype, backend: str = "inductor") -> None:
        self.suite = suite
        self.device = device
        self.dtype = dtype
        self._backend = backend
        self.pipe, call = suite.build(device, dtype)
        to_channels_last(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {"guidance_scale": 7.5, **call, "num_inference_steps": suite.steps}
        self._optimized: dict[str, Any] = {}
        self.held = memory_in_use(device)

    @property
    def in_use(self) -> tuple[str, ...]:
        """The methods whose optimized pipelines exist."""
        return tuple(self._optimized)

    def release(self, method: str) -> None:
        """Free the graphs of a method that is not needed any more."""
        if method in self._optimized:
            restore(self._optimized.pop(method))

    def optimized(self, method: str) -> Any:
        """Return the pipeline that is optimized by `method`; every call returns the same one."""
        if method not in self._optimized:
            options = {"cuda_graphs": True} if self.device.type == "cuda" and self._backend == "inductor" else {}
            schedule = self._schedule(method)
            pipe = optimize(twin_of(self.pipe), schedule, backend=self._backend, backend_options=options)
            self._optimized[method] = pipe
        return self._optimized[method]

    def compile_graphs(self, method: str, part: int, parts: int) -> list[str]:
        """Compile every `parts`-th graph of a method, from `part`, without running it; return the graphs' names."""
        pipe = self.optimized(method)
        hook = required_state_of(pipe).hook
        (plan,) = preview(pipe, self.call).values()
        compiler = backend_class(self._backend)({})
        names = []
        graphs = {phase: call for step in plan.graphs for phase, call in step}
        for phase, call in list(graphs.items())[part::parts]:
            variant, _ = hook.store.variant(phase, call, hook.own_forward)
            compiler.compile(variant, [torch.empty(0, device=self.device)])
            names.append(phase.name)
        return names

    def _schedule(self, method: str) -> Schedule:
        found = next(each.schedule for each in methods_for(self.suite.gates[0]) if each.key == method)
        assert found is not None
        return found

    def ready(self, contender: Contender, gate: int) -> tuple[Any, Ready]:
        """Return the pipeline of a contender, and how it makes images with a gate."""
        if contender.method == PLAIN:
            pipe = twin_of(self.pipe)
            if contender.mode == "eager":
                return pipe, Ready(pipe)
            # The other model has the same code: Dynamo would take its sizes for free ones, or give up compiling.
            torch._dynamo.reset()
            mode = "reduce-overhead" if contender.mode == "cuda_graphs" and self._backend == "inductor" else None
            return pipe, compiled(pipe, mode=mode, backend=self._backend)
        peer = next((peer for peer in PEERS if peer.key == contender.method), None)
        if peer is not None:
            if not peer.is_installed:
                raise TGateError(f"{peer.package} is not installed")
            pipe = twin_of(self.pipe)
            return pipe, peer.prepare(with_private_class(pipe), gate)
        pipe = self.optimized(contender.method)

        def generate(**call: Any) -> Any:
            direct = contender.mode == "compiled"
            context: AbstractContextManager[None] = without_cuda_graphs() if direct else nullcontext()
            with context:
                return pipe(**call, gate_step=gate)

        return pipe, Ready(generate)

    def generate(self, pipe: Any, ready: Ready) -> Timed:
        """Make the image, from the same noise each time."""
        return timed_generation(pipe, self.call, 0, ready.generate)

    @property
    def rows_of_calls(self) -> dict[str, int]:
        """Return the sum of the batch sizes of all denoiser calls in a plain image."""
        return dict.fromkeys(denoiser_names(self.pipe), 2 * self.suite.steps)

    def setting(self) -> Mapping[str, str]:
        """Return the settings of the pipeline, as plain data."""
        return setting_of(self.pipe, {name: getattr(self.pipe, name) for name in denoiser_names(self.pipe)})


@dataclass(frozen=True)
class Goal:
    """A goal and the measured value; None if it has not been measured."""

    what: str
    aim: float
    at_most: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.aim if self.at_most else self.measured >= self.aim


class Measurement:
    """The rows of one suite, measured one after another.

    Args:
        bench: the pipelines.
        contenders: the contenders to measure, the most important first.
        repeat: number of timed images of a row; the median counts.
        deadline: when to stop, also in the middle of a row.
    """

    def __init__(self, bench: Bench, contenders: Sequence[Contender], repeat: int, deadline: Deadline) -> None:
        self._bench = bench
        self._repeat = repeat
        self._deadline = deadline
        self._plan = [
            (contender, gate, _row(contender, gate, first=bench.suite.gates[0]))
            for contender in contenders
            for gate in (bench.suite.gates if contender.all_gates else bench.suite.gates[:1])
        ]
        self._first_calls: dict[str, dict[str, float]] = {}
        self._latents: dict[str, torch.Tensor] = {}
        self._agreement: dict[str, float | str] = {}
        self._plain_macs: float | None = None

    def run(self, done: Callable[[BenchmarkRow], None]) -> None:
        """Measure all rows; `done` is called after each of them."""
        for position, (contender, gate, row) in enumerate(self._plan):
            if self._deadline.left < contender.needs:
                row.error = MSG_NO_TIME
            else:
                self._measure(contender, gate, row)
            later = [other.method for other, _, _ in self._plan[position + 1 :]]
            if contender.method not in (TRACED, *later):
                self._bench.release(contender.method)
            done(row)

    def _measure(self, contender: Contender, gate: int, row: BenchmarkRow) -> None:
        pipe, ready = None, None
        try:
            before, held = _cache_counts(), memory_in_use(self._bench.device)
            known = contender.method in self._bench.in_use
            pipe, ready = self._bench.ready(contender, gate)
            first = self._bench.generate(pipe, ready)
            row.first_seconds = first.seconds
            self._first_calls[row.key] = {"seconds": first.seconds} | {
                name: count - before[name] for name, count in _cache_counts().items()
            }
            peak = self._count(pipe, ready, row, is_plain=contender.mode == "eager" and contender.method == PLAIN)
            if not known:  # otherwise the pipeline's own memory cannot be told from that of the others
                row.peak_bytes = None if peak is None else peak - held + self._bench.held
            while len(row.seconds) < self._repeat and (self._deadline.left > 0 or not row.seconds):
                self._time(pipe, ready, row, gate)
            self._compare(row, first)
        except Exception as error:  # report the error in the row, and measure the others
            row.error = first_line(error, named=True)
        finally:
            if ready is not None:
                ready.undo()
            if contender.method == PLAIN and contender.mode != "eager":
                torch._dynamo.reset()
            del pipe, ready
            gc.collect()
            if self._bench.device.type == "cuda":
                torch.cuda.empty_cache()

    def _count(self, pipe: Any, ready: Ready, row: BenchmarkRow, *, is_plain: bool) -> int | None:
        """Count the operations of an image that is not timed, and return its peak memory use."""
        denoisers = {name: getattr(pipe, name) for name in denoiser_names(self._bench.pipe)}
        with peak_memory(self._bench.device) as peak:
            if is_plain:
                with macs_counted(denoisers) as count:
                    self._bench.generate(pipe, ready)
                row.macs = count.macs
            else:
                self._bench.generate(pipe, ready)
        if state_of(pipe) is not None:
            cost = cost_of_last(pipe)
            row.macs, row.strip, row.cache_bytes = cost.macs, cost.strip, cost.cache_bytes
            self._plain_macs = plain_macs(pipe, self._bench.rows_of_calls)
        return peak.total if self._bench.device.type == "cuda" else peak.added

    def _time(self, pipe: Any, ready: Ready, row: BenchmarkRow, gate: int) -> None:
        timed = self._bench.generate(pipe, ready)
        row.seconds.append(timed.seconds)
        row.steps.append(list(timed.steps))
        early, late = timed.steps[1:gate], timed.steps[gate:]
        if early:
            row.early.append(median(early))
        if late:
            row.late.append(median(late))

    def _compare(self, row: BenchmarkRow, timed: Timed) -> None:
        """Compare the latents with those of the first row with the same schedule."""
        if row.strip:
            difference = relative_difference(timed.latents, self._latents.setdefault(row.strip, timed.latents))
            self._agreement[row.key] = difference if math.isfinite(difference) else str(difference)

    def result(self) -> dict[str, Any]:
        """Return the results so far, as plain data."""
        bench = self._bench
        rows = [row for _, _, row in self._plan]
        for row in rows:
            if row.key in BASELINES.values() and row.macs is None and row.seconds:
                row.macs = self._plain_macs
        plain = next((row for row in rows if row.key == PLAIN), BenchmarkRow(PLAIN, "plain, eager", "", PLAIN))
        # `Benchmark` expects the plain row first, which may not have been measured yet.
        first = replace(plain, macs=plain.macs or self._plain_macs)
        others = [row for row in rows if row is not plain]
        gate = bench.suite.gates[0]
        benchmark = Benchmark(bench.setting(), machine_of(bench.device), bench.suite.steps, gate, (first, *others))
        result = {"name": bench.suite.name, "dtype": str(bench.dtype).removeprefix("torch."), **benchmark.as_dict()}
        result["first_calls"] = self._first_calls
        result["relative_difference"] = self._agreement
        result["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals_of(bench.suite, benchmark)]
        return result


def _row(contender: Contender, gate: int, *, first: int) -> BenchmarkRow:
    suffix = "" if gate == first else f"_gate_{gate}"
    title = contender.title if gate == first else f"{contender.title}, gate {gate}"
    backend = contender.mode if contender.method not in (PLAIN, *(peer.key for peer in PEERS)) else ""
    return BenchmarkRow(contender.key + suffix, title, backend, BASELINES[contender.mode])


def _cache_counts() -> dict[str, float]:
    """Return how many graphs Inductor has found in its cache, and how many it has compiled."""
    from torch._dynamo.utils import counters

    return {f"cache_{what}": counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")}


def measure(
    suites: Sequence[Suite],
    device: torch.device,
    dtype: torch.dtype,
    *,
    minutes: float,
    out: Path,
    repeat: int = 5,
    contenders: Sequence[Contender] = CONTENDERS,
    backend: str = "inductor",
    trace: Path | None = None,
    command: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run all suites one after another, and write the results to `out` after each row."""
    began = clock()
    deadline = Deadline(began + 60 * minutes, clock)
    data: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "python": platform.python_version(),
        "complete": False,
        "minutes": 0.0,
        "suites": [],
    }
    benches = []
    for suite in suites:
        if deadline.left <= 0:
            break
        bench = Bench(suite, device, dtype, backend)
        measurement = Measurement(bench, contenders, repeat, deadline)
        data["suites"].append(None)

        def done(row: BenchmarkRow, suite: Suite = suite, measurement: Measurement = measurement) -> None:
            data["suites"][-1] = measurement.result()
            data["minutes"] = (clock() - began) / 60
            write_json(data, out)
            shown = row.error or f"{row.image:.3f} s, {len(row.seconds)} images"
            print(f"{60 * data['minutes']:6.1f} s {suite.name} {row.title}: {shown}", flush=True)

        measurement.run(done)
        benches.append(bench)
    data["complete"] = True
    write_json(data, out)
    for bench in benches if trace is not None else ():
        assert trace is not None
        if deadline.left > TRACE_SECONDS:
            trace.mkdir(parents=True, exist_ok=True)
            write_trace(bench, trace / f"{bench.suite.name}.json")
    return data


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Replace the file at `path` in one go, so that it is complete at any time."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def goals_of(suite: Suite, benchmark: Benchmark) -> Iterator[Goal]:
    """Yield the goals of one model: time saved relative to operations saved, cost of switching graphs, cache size."""
    for row in benchmark.rows:
        if not row.strip or row.error is not None:
            continue
        what = f"{row.title}: speedup over {row.baseline}, of the operations' ratio"
        yield Goal(what, 0.95, False, benchmark.efficiency(row))
        if row.key.startswith(("tgate_cuda_graphs", "tgate_compiled")):
            yield Goal(f"{row.title}: crossing the gate, of a step", 0.01, True, crossing_cost(row))
        if suite.name == "sdxl":
            yield Goal(f"{row.title}: caches, GB", 0.25, True, (row.cache_bytes or 0) / 1e9)
            if row.key == "tgate_cuda_graphs":
                yield Goal(f"{row.title}: {suite.steps} steps, s", 0.75, True, row.image)


def crossing_cost(row: BenchmarkRow) -> float | None:
    """Return the additional time of the two steps at the gate, relative to a step before the gate.

    Returns None if there is no other step of the same kind to compare each of the two with. The first step does not
    count, since it includes the work before the loop.
    """
    if not row.steps or "p" not in row.strip:
        return None
    medians = [median(times) for times in zip(*row.steps, strict=True)]
    gate = row.strip.index("p")
    before, after = medians[1 : gate - 1], medians[gate + 1 :]
    if not before or not after:
        return None
    early, late = median(before), median(after)
    return (medians[gate - 1] - early + medians[gate] - late) / early


def write_trace(bench: Bench, path: Path) -> None:
    """Write a trace of one gated image in Chrome's format, which shows what the GPU does and when it is idle."""
    pipe = bench.optimized(TRACED)
    pipe(**bench.call)
    with torch.profiler.profile() as profiler:
        pipe(**bench.call)
    profiler.export_chrome_trace(str(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=".json file to write")
    parser.add_argument("--minutes", type=float, default=6.0, help="time after which nothing more is measured")
    parser.add_argument("--repeat", type=int, default=5, help="number of timed images; the median counts")
    parser.add_argument("--trace", type=Path, help="folder for a trace of a gated image of each model")
    add_choices(parser)
    keys = [contender.key for contender in CONTENDERS]
    parser.add_argument("--contenders", nargs="+", choices=keys, metavar="KEY", help=f"some of {', '.join(keys)}")
    parser.add_argument("--models", nargs="+", choices=list(_GATES), default=list(_GATES), help="in this order")
    given = parser.parse_args(arguments)
    if not given.out.parent.is_dir():
        parser.error(f"--out: the folder {given.out.parent} does not exist")
    device, dtype = checked_device(parser, given)
    data = measure(
        suites_for(given.models, tiny=given.tiny), device, dtype,
        minutes=given.minutes, out=given.out, repeat=given.repeat, trace=given.trace, backend=given.backend,
        contenders=[each for each in CONTENDERS if given.contenders is None or each.key in given.contenders],
        command=shlex.join(["python", *(sys.argv if arguments is None else ["benchmarks/gpu.py", *arguments])]),
    )  # fmt: skip
    for suite in data["suites"]:
        for goal in suite["goals"]:
            met = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
            print(f"{suite['name']}: {goal['what']}: {goal['measured']}, goal {goal['aim']}: {met}")
    print(f"written {given.out}")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the options that `gpu.py` and `gpu_warm.py` have in common."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="embedded models and 6 steps, to try the script")
    parser.add_argument(
        "--backend", choices=["inductor", "eager"], default="inductor", help="eager: to try the script in seconds"
    )


def checked_device(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype to measure with, or exit if there is no such device."""
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found; --device cpu --tiny tries the script, and `tgate-compile bench` measures")
    if given.tiny:
        torch.set_num_threads(1)  # on small tensors more threads gain nothing, and wait for each other
    device = torch.device("cuda", torch.cuda.current_device()) if given.device == "cuda" else torch.device("cpu")
    return device, torch.bfloat16 if given.device == "cuda" else torch.float32


if __name__ == "__main__":
    try:
        main()
    except TGateError as error:
        sys.exit(f"error: {error}")
