"""benchmarks/gpu.py and gpu_warm.py, the commands for GPUs, run on a CPU with tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import tiny_pipelines
from tgate_compile.study.bench.measure import _DeviceMarks, idle_in_pools
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.bench.run import MSG_NO_TIME

pytestmark = [
    # torch.profiler in 2.11, also for a profile of a single cycle
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle:UserWarning"),
]

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TRY_OUT = ["--device", "cpu", "--tiny", "--backend", "eager"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module, and gpu_warm imports gpu
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    yield script("gpu")
    del sys.modules["gpu"]


def tiny(device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    pipe = tiny_pipelines.stable_diffusion(layout="small").to(device, dtype)
    return pipe, {"prompt": "red cat", "output_type": "latent", "guidance_scale": 5.0}


class Clock:
    """A clock that only generations move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of a world in which every generation takes ten seconds."""
    made = Clock()
    generate = gpu.Bench.generate

    def slow(self: Any, pipe: Any, ready: Any) -> Any:
        made.now += 10
        return generate(self, pipe, ready)

    monkeypatch.setattr(gpu.Bench, "generate", slow)
    return made


def chosen(gpu: ModuleType, *keys: str) -> list[Any]:
    return [contender for contender in gpu.CONTENDERS if contender.key in keys]


# Order and sharing.


def test_the_most_important_rows_come_first(gpu: ModuleType) -> None:
    assert [contender.key for contender in gpu.CONTENDERS][:6] == [
        "tgate_cuda_graphs",
        "plain_compiled",
        "plain_cuda_graphs",
        "plain",
        "tgate_compiled",
        "deepcache_tgate_cuda_graphs",
    ]
    suites = gpu.suites_for(["sdxl", "sd15"])
    assert [(suite.name, suite.gates, suite.steps) for suite in suites] == [("sdxl", (10, 5), 25), ("sd15", (10,), 25)]
    # Each is compared with the plain pipeline that runs in the same way.
    assert {c.key: gpu.BASELINES[c.mode] for c in gpu.CONTENDERS if c.method == "tgate"} == {
        "tgate_cuda_graphs": "plain_cuda_graphs",
        "tgate_compiled": "plain_compiled",
    }


@pytest.mark.heavy
def test_rows_share_pipelines_and_the_file_grows_with_each(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized: list[Any] = []
    own = gpu.optimize
    monkeypatch.setattr(
        gpu, "optimize", lambda *args, **kwargs: optimized.append(own(*args, **kwargs)) or optimized[-1]
    )
    out = tmp_path / "gpu.json"
    files: list[Any] = []
    write = gpu.write_json

    def written(data: Any, path: Path) -> None:
        write(data, path)
        files.append(json.loads(path.read_text()))

    monkeypatch.setattr(gpu, "write_json", written)
    suites = (gpu.Suite("sdxl", tiny, (4, 2), steps=6), gpu.Suite("late", tiny, (4,), steps=6))
    contenders = chosen(gpu, "tgate_cuda_graphs", "plain", "tgate_compiled")
    data = gpu.measure(
        suites, CPU, torch.float32, minutes=60, out=out, repeat=1, contenders=contenders, backend="eager",
        trace=tmp_path,
    )  # fmt: skip
    assert files[-1] == json.loads(json.dumps(data, allow_nan=False))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]

    first = data["suites"][0]
    rows = {row["key"]: row for row in first["rows"]}
    gates = ["tgate_cuda_graphs", "tgate_cuda_graphs_gate_2", "tgate_compiled", "tgate_compiled_gate_2"]
    assert list(rows) == ["plain", *gates]
    assert [rows[key]["strip"] for key in gates] == ["FFFFpp", "FFpppp"] * 2
    assert first["relative_difference"] == dict.fromkeys(gates, 0.0)
    assert len(rows["tgate_cuda_graphs"]["step_seconds"]) == 6
    assert rows["plain"]["macs"] > rows["tgate_cuda_graphs"]["macs"] > rows["tgate_cuda_graphs_gate_2"]["macs"]

    # One pipeline for four rows, of which two graphs are compiled.
    assert len(optimized) == 2
    assert [pipe._tgate_compile.hook.store.compilations for pipe in optimized] == [2, 2]

    # After each row there is a complete file with the rows so far.
    measured = [[row["key"] for row in file["suites"][0]["rows"] if row["image_seconds"] is not None] for file in files]
    assert measured[:5] == [gates[:1], gates[:2], ["plain", *gates[:2]], ["plain", *gates[:3]], ["plain", *gates]]
    assert [file["complete"] for file in files] == [False] * (len(files) - 1) + [True]
    goals = {goal["what"]: goal for goal in first["goals"]}
    assert goals["T-GATE v1, CUDA graphs: caches, GB"]["met"]
    # Without the row of torch.compile there is nothing to compare with.
    assert goals["T-GATE v1, compiled: speedup over plain_compiled, of the operations' ratio"]["met"] is None
    assert json.loads((tmp_path / "late.json").read_text())["traceEvents"]


# The deadline.


@pytest.mark.heavy
def test_the_deadline_ends_rows_and_the_images_of_a_row(gpu: ModuleType, clock: Clock, tmp_path: Path) -> None:
    suites = (gpu.Suite("sdxl", tiny, (4, 2), steps=6), gpu.Suite("late", tiny, (4,), steps=6))
    contenders = chosen(gpu, "tgate_cuda_graphs", "plain_compiled", "plain")
    data = gpu.measure(
        suites, CPU, torch.float32, minutes=2, out=tmp_path / "gpu.json", repeat=5, contenders=contenders,
        backend="eager", trace=tmp_path / "traces", clock=clock,
    )  # fmt: skip
    (suite,) = data["suites"]  # there was no time for another model
    rows = {row["key"]: row for row in suite["rows"]}
    # 70 s for all images of the first row; the second gate needs 60 s, but plain_compiled only 40 of the 50 s left.
    assert len(rows["tgate_cuda_graphs"]["seconds"]) == 5
    assert rows["tgate_cuda_graphs_gate_2"]["error"] == MSG_NO_TIME
    assert len(rows["plain_compiled"]["seconds"]) == 3
    assert rows["plain"]["error"] == MSG_NO_TIME
    assert data["minutes"] == 2
    assert not (tmp_path / "traces").exists()


def test_a_row_that_fails_does_not_stop_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu, "optimize", broken)
    suites = (gpu.Suite("tiny", tiny, (4,), steps=6),)
    data = gpu.measure(
        suites, CPU, torch.float32, minutes=60, out=tmp_path / "gpu.json", repeat=1, backend="eager",
        contenders=chosen(gpu, "tgate_cuda_graphs", "plain"),
    )  # fmt: skip
    plain, tgate = data["suites"][0]["rows"]
    assert "no kernel image is available" in tgate["error"]
    assert plain["image_seconds"] > 0


# Figures.


def test_the_gate_costs_what_its_two_steps_take_beyond_their_like(gpu: ModuleType) -> None:
    row = BenchmarkRow("x", "x", "eager", "plain", strip="FFFFpppp")
    assert gpu.crossing_cost(row) is None
    row.steps = [[9.0, 2.0, 2.0, 2.1, 1.3, 1.0, 1.0, 1.0]]
    assert gpu.crossing_cost(row) == pytest.approx((0.1 + 0.3) / 2)


@pytest.mark.parametrize("strip", ["Fpppp", "FFppp", "FFFFp", "FFFFF"])
def test_a_gate_without_other_steps_of_its_kind_has_no_cost(gpu: ModuleType, strip: str) -> None:
    """The first step includes the work before the loop: compared with it, a gate at step 2 would cost less than 0."""
    row = BenchmarkRow("x", "x", "eager", "plain", strip=strip, steps=[[9.0, 2.0, 1.3, 1.0, 1.0]])
    assert gpu.crossing_cost(row) is None


def test_efficiency_compares_like_with_like(gpu: ModuleType) -> None:
    def row(key: str, baseline: str, seconds: float, macs: float, strip: str = "") -> BenchmarkRow:
        return BenchmarkRow(key, key, "", baseline, seconds=[seconds], macs=macs, strip=strip)

    rows = (
        row("plain", "plain", 4.0, 100.0),
        row("plain_compiled", "plain_compiled", 2.4, 100.0),
        row("plain_cuda_graphs", "plain_cuda_graphs", 2.0, 100.0),
        row("tgate_cuda_graphs", "plain_cuda_graphs", 1.25, 60.0, "FFpp"),
        row("tgate_compiled", "plain_compiled", 1.5, 60.0, "FFpp"),
    )
    goals = {goal.what: goal for goal in gpu.goals_of(gpu.suites_for(["sdxl"])[0], Benchmark({}, {}, 4, 2, rows))}
    efficiency = [goal.measured for what, goal in goals.items() if "of the operations' ratio" in what]
    assert efficiency == [pytest.approx(2.0 / 1.25 * 0.6), pytest.approx(2.4 / 1.5 * 0.6)]
    assert goals["tgate_cuda_graphs: 25 steps, s"].measured == 1.25


def test_pools_of_cuda_graphs_count_as_memory_in_use() -> None:
    """As torch.cuda.memory_snapshot() describes them; the allocator counts what a replay uses as free."""
    segments = [
        {"device": 0, "total_size": 100, "allocated_size": 60, "segment_pool_id": (0, 0)},  # the usual pool
        {"device": 0, "total_size": 50, "allocated_size": 20, "segment_pool_id": (3, 0)},
        {"device": 0, "total_size": 10, "allocated_size": 0, "segment_pool_id": (0, 4)},
        {"device": 1, "total_size": 70, "allocated_size": 0, "segment_pool_id": (5, 0)},
    ]
    assert idle_in_pools(segments, 0) == 30 + 10
    assert idle_in_pools(segments, 1) == 70
    assert idle_in_pools([], 0) == 0


def test_steps_on_a_gpu_are_timed_by_the_gpu() -> None:
    """Nothing waits while the steps run: torch.cuda would only be asked for the times afterwards."""

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: int | None = None

        def record(self) -> None:
            Event.made += 1
            self.at = Event.made**2

        def elapsed_time(self, other: Event) -> float:  # in milliseconds
            assert self.at is not None
            assert other.at is not None
            return float(other.at - self.at)

    class Cuda:
        pass

    Cuda.Event = Event  # type: ignore[attr-defined]
    marks = _DeviceMarks(Cuda)
    for _ in range(4):
        marks.set()
    assert marks.between() == (0.003, 0.005, 0.007)


# The commands.


@pytest.mark.heavy
def test_both_commands_can_be_tried_on_a_cpu(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    warm = script("gpu_warm").main
    assert [warm(["sd15", "tgate_cuda_graphs", "--part", part, *TRY_OUT]) for part in "01"] == [0, 0]
    shown = capsys.readouterr().out
    assert "sd15 tgate_cuda_graphs full: " in shown
    assert "sd15 tgate_cuda_graphs pruned: " in shown
    out = tmp_path / "gpu.json"
    arguments = ["--out", str(out), "--models", "sd15", "--contenders", "tgate_cuda_graphs", "--repeat", "1"]
    gpu.main([*arguments, *TRY_OUT])
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["command"].startswith("python benchmarks/gpu.py --out ")
    assert [row["error"] for row in data["suites"][0]["rows"]] == [None, None]  # T-GATE's, and an empty plain one
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(out)])
        assert "no CUDA device found" in capsys.readouterr().err


def commands() -> list[str]:
    """Return the two commands in benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    section = text.partition("## A quarter of an hour on a GPU")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks if "benchmarks/gpu" in block][:2]


def test_the_commands_name_what_there_is(gpu: ModuleType) -> None:
    first, second = commands()
    keys, models = {contender.key for contender in gpu.CONTENDERS}, {"sdxl", "sd15", "pixart_alpha"}
    for arguments in re.findall(r"gpu_warm\.py ([a-z0-9_ ]+)", first):
        model, *contenders = arguments.split()
        assert model in models
        assert contenders
        assert set(contenders) <= keys
    assert "tests/test_gpu.py" in first
    assert "benchmarks/gpu.py" in second


@pytest.mark.heavy
def test_the_second_command_finds_what_the_first_has_compiled(tmp_path: Path) -> None:
    """Both as they are typed, but on the CPU, with the embedded model that compiles fastest, and fewer contenders."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    try_out = ["--device", "cpu", "--tiny"]
    contenders = ["tgate_cuda_graphs", "plain_compiled"]
    warm = [sys.executable, "benchmarks/gpu_warm.py", "pixart_alpha", *contenders, *try_out, "--minutes", "20"]
    subprocess.run(warm, check=True, cwd=ROOT, env=environment, timeout=1300)
    out = tmp_path / "gpu.json"
    run = [sys.executable, "benchmarks/gpu.py", "--models", "pixart_alpha", "--contenders", *contenders, *try_out]
    subprocess.run([*run, "--repeat", "1", "--out", str(out)], check=True, cwd=ROOT, env=environment, timeout=600)
    (suite,) = json.loads(out.read_text())["suites"]
    for key in contenders:
        assert suite["first_calls"][key]["cache_miss"] == 0
        assert suite["first_calls"][key]["cache_hit"] > 0
