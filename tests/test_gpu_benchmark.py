"""benchmarks/gpu.py, the command for GPUs, run on a CPU with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import tiny_pipelines
from tgate_compile.study.bench.result import BenchmarkRow
from tgate_compile.study.bench.run import MSG_NO_TIME

pytestmark = pytest.mark.usefixtures("shared_captures")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def tiny(device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    pipe = tiny_pipelines.stable_diffusion(layout="small").to(device, dtype)
    return pipe, {"prompt": "red cat", "output_type": "latent", "guidance_scale": 5.0}


def test_one_command_measures_all(gpu: ModuleType, tmp_path: Path) -> None:
    suites = (gpu.Suite("sdxl", tiny, (4, 2), 0.5, steps=6), gpu.Suite("late", tiny, (4,), 0.5, steps=6))
    data = gpu.measure(
        suites, torch.device("cpu"), torch.float32, ("eager",), minutes=60, repeat=1, trace=tmp_path, peers=()
    )
    json.dumps(data, allow_nan=False)
    first = data["suites"][0]
    rows = {row["key"]: row for row in first["rows"]}
    assert list(rows) == ["plain", "tgate_eager", "tgate_2_eager", "tgate_v2_eager", "deepcache_tgate_eager"]
    assert rows["tgate_eager"]["strip"] == "FFFFpp"
    assert rows["tgate_2_eager"]["strip"] == "FFpppp"
    assert len(rows["tgate_eager"]["step_seconds"]) == 6
    assert rows["tgate_eager"]["cache_bytes"] > 0
    goals = {goal["what"]: goal for goal in first["goals"]}
    assert goals["T-GATE v1, eager: caches, GB"]["met"]
    # Without a torch.compile row there is nothing to compare with.
    assert goals["T-GATE v1, eager: speedup over torch.compile, of the operations' ratio"]["met"] is None
    assert json.loads((tmp_path / "late.json").read_text())["traceEvents"]


def test_what_comes_too_late_is_a_row_that_says_so(gpu: ModuleType) -> None:
    suites = (gpu.Suite("tiny", tiny, (4,), 1.0, steps=6),)
    data = gpu.measure(suites, torch.device("cpu"), torch.float32, ("eager",), minutes=0, repeat=1, peers=())
    assert {row["error"] for row in data["suites"][0]["rows"]} == {MSG_NO_TIME}


def test_the_gate_costs_what_its_two_steps_take_beyond_their_like(gpu: ModuleType) -> None:
    row = BenchmarkRow("x", "x", "eager", "plain", strip="FFFFpppp", early=[2.0], late=[1.0])
    row.steps = [[9.0, 2.0, 2.0, 2.1, 1.3, 1.0, 1.0, 1.0]]
    assert gpu.crossing_cost(row) == pytest.approx((0.1 + 0.3) / 2)
    assert gpu.crossing_cost(BenchmarkRow("x", "x", "eager", "plain")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that it would measure for minutes")
def test_without_a_gpu_it_says_what_measures_here(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
