"""Run all GPU benchmarks with one command, and write the results to one file.

    pip install -c constraints.txt -e '.[cli]'; pip install --no-deps tgate==1.0.0 DeepCache==0.1.1
    python benchmarks/gpu.py --out benchmarks/results/gpu.json

The denoisers have the sizes of real models and random weights, in bfloat16 and channels-last format. Each generation
has one prompt and 25 steps. Compared are the plain pipeline (eager, with torch.compile, and with CUDA graphs), this
library's schedules (compiled, with and without CUDA graphs), and other packages. When the time is up, the remaining
rows are marked as skipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tgate_compile import optimize, restore
from tgate_compile._errors import TGateError
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.methods import PEERS, PLAIN, ComparedMethod, Peer, methods_for, random_pipeline
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.bench.run import COMPILED, CUDA_GRAPHS, Task, run_benchmark, to_channels_last

_CHOSEN = ("tgate", "tgate_v2", "deepcache_tgate")
_OTHERS = ("tgate_authors", "deepcache_tgate_authors")


@dataclass(frozen=True)
class Suite:
    """The measurements of one model.

    Attributes:
        name: name of the model.
        build: makes a plain pipeline and the arguments of its call.
        gates: gate steps. All methods are measured with the first one, only T-GATE v1 with the others.
        share: fraction of the total time.
        steps: number of denoising steps.
    """

    name: str
    build: Callable[[torch.device, torch.dtype], tuple[Any, dict[str, Any]]]
    gates: tuple[int, ...]
    share: float
    steps: int = 25


def _random(name: str) -> Callable[[torch.device, torch.dtype], tuple[Any, dict[str, Any]]]:
    return partial(random_pipeline, name)


SUITES = (
    Suite("sdxl", _random("sdxl"), (10, 5), 0.6),
    Suite("sd15", _random("sd15"), (10,), 0.2),
    Suite("pixart_alpha", _random("pixart_alpha"), (8,), 0.2),
)


@dataclass(frozen=True)
class Goal:
    """A goal and the measured value; None if the row has no measurements."""

    what: str
    aim: float
    at_most: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.aim if self.at_most else self.measured >= self.aim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=".json file to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which no further row is started")
    parser.add_argument("--repeat", type=int, default=5, help="number of timed images; the median counts")
    parser.add_argument("--trace", type=Path, help="folder for a trace of a gated image of each model")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device found; use `tgate-compile bench` to measure on a CPU")
    if not given.out.parent.is_dir():
        parser.error(f"--out: the folder {given.out.parent} does not exist")
    data = measure(
        SUITES, torch.device("cuda"), torch.bfloat16, ("inductor", CUDA_GRAPHS),
        minutes=given.minutes, repeat=given.repeat, trace=given.trace,
    )  # fmt: skip
    data = {"command": shlex.join(["python", *sys.argv])} | data
    given.out.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for suite in data["suites"]:
        for goal in suite["goals"]:
            met = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
            print(f"{suite['name']}: {goal['what']}: {goal['measured']}, goal {goal['aim']}: {met}")
    print(f"written {given.out}")


def measure(
    suites: Sequence[Suite],
    device: torch.device,
    dtype: torch.dtype,
    backends: Sequence[str],
    *,
    minutes: float,
    repeat: int,
    trace: Path | None = None,
    peers: Sequence[Peer] = tuple(peer for peer in PEERS if peer.key in _OTHERS),
) -> dict[str, Any]:
    """Run all suites one after another; time that a suite does not use is available to the next ones."""
    began = time.monotonic()
    measured, shares = [], 0.0
    for suite in suites:
        shares += suite.share
        until = began + 60 * minutes * shares / sum(each.share for each in suites)
        pipe, call = suite.build(device, dtype)
        to_channels_last(pipe)
        call = {"guidance_scale": 7.5, **call, "num_inference_steps": suite.steps}
        task = Task(call, suite.steps, suite.gates[0], repeat=repeat, until=until)
        benchmark = run_benchmark(pipe, task, _methods(suite), backends, peers, progress=_report(suite.name))
        result = {"name": suite.name, "dtype": str(dtype).removeprefix("torch."), **benchmark.as_dict()}
        result["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals_of(suite, benchmark)]
        measured.append(result)
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
            write_trace(pipe, call, suite.gates[0], backends[-1], trace / f"{suite.name}.json")
        del pipe
        torch.cuda.empty_cache()
    return {
        "format": "tgate_compile.gpu",
        "python": platform.python_version(),
        "minutes": (time.monotonic() - began) / 60,
        "suites": measured,
    }


def _methods(suite: Suite) -> list[ComparedMethod]:
    methods = [method for method in methods_for(suite.gates[0]) if method.key in (PLAIN, *_CHOSEN)]
    earlier = [ComparedMethod(f"tgate_{gate}", f"T-GATE v1, gate {gate}", Schedule(gate)) for gate in suite.gates[1:]]
    return [*methods[:2], *earlier, *methods[2:]]


def goals_of(suite: Suite, benchmark: Benchmark) -> Iterator[Goal]:
    """Yield the goals of one model: time saved relative to operations saved, cost of switching graphs, cache size."""
    compiled = next((row.image for row in benchmark.rows if row.key == COMPILED), None)
    for row in benchmark.rows:
        if not row.strip or row.error is not None:
            continue
        ratio, image = benchmark.macs_ratio(row), row.image
        efficiency = None if None in (compiled, ratio, image) else compiled / image / ratio  # type: ignore[operator]
        yield Goal(f"{row.title}: speedup over torch.compile, of the operations' ratio", 0.95, False, efficiency)
        if not row.key.startswith("tgate_v2") and "deepcache" not in row.key:
            yield Goal(f"{row.title}: crossing the gate, of a step", 0.01, True, crossing_cost(row))
        if suite.name == "sdxl":
            yield Goal(f"{row.title}: caches, GB", 0.25, True, (row.cache_bytes or 0) / 1e9)
            if row.key == f"tgate_{row.backend}":
                yield Goal(f"{row.title}: 25 steps, s", 0.75, True, image)


def crossing_cost(row: BenchmarkRow) -> float | None:
    """Return the additional time of the two steps at the gate, relative to a step before the gate."""
    if not row.steps or not row.early or not row.late:
        return None
    medians = [median(times) for times in zip(*row.steps, strict=True)]
    gate = row.strip.index("p")
    early, late = median(medians[1 : gate - 1] or medians[:1]), median(medians[gate + 1 :] or medians[-1:])
    return (medians[gate - 1] - early + medians[gate] - late) / early


def write_trace(pipe: Any, call: dict[str, Any], gate: int, backend: str, path: Path) -> None:
    """Write a trace of one gated image in Chrome's format, which shows what the GPU does and when it is idle."""
    graphs = {"cuda_graphs": True} if backend == CUDA_GRAPHS else {}
    optimize(pipe, gate, backend="inductor" if backend == CUDA_GRAPHS else backend, backend_options=graphs)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**call)
        with torch.profiler.profile() as profiler:
            pipe(**call)
        profiler.export_chrome_trace(str(path))
    finally:
        restore(pipe)


def _report(name: str) -> Callable[[int, int, str], None]:
    began = time.monotonic()
    return lambda done, total, what: print(
        f"{time.monotonic() - began:6.1f} s {name} {done}/{total} {what}", flush=True
    )


if __name__ == "__main__":
    try:
        main()
    except TGateError as error:
        sys.exit(f"error: {error}")
