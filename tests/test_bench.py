"""Benchmarks: figures are consistent, other packages are measured under their own names, failures become rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile import ConfigurationError, describe, optimize, restore
from tgate_compile._cli import loading
from tgate_compile._cli.app import app
from tgate_compile._cli.bench import _backends, _peers
from tgate_compile._cli.options import Backend
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import save_schedule
from tgate_compile.study.bench.measure import macs_counted, timed_generation
from tgate_compile.study.bench.methods import NAMES, PEERS, methods_for, random_pipeline, with_private_class
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow
from tgate_compile.study.bench.run import CUDA_GRAPHS, Task, run_benchmark

run = CliRunner().invoke

STEPS, GATE, REPEAT = 6, 3, 2
CHOSEN = ("plain", "tgate", "adaptive_guidance")


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Benchmark]:
    """Return a plain pipeline and its benchmark."""
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    task = Task({"prompt": "red cat", "guidance_scale": 5.0, "num_inference_steps": STEPS}, STEPS, GATE, REPEAT)
    methods = [method for method in methods_for(GATE) if method.key in (*CHOSEN, "tgate_v2")]
    return pipe, run_benchmark(pipe, task, methods, ["eager"], PEERS)


def row_of(benchmark: Benchmark, key: str) -> BenchmarkRow:
    return next(row for row in benchmark.rows if row.key == key)


def test_every_contender_is_a_row(measured: tuple[Any, Benchmark]) -> None:
    _, benchmark = measured
    ours = ["plain", "tgate_eager", "tgate_v2_eager", "adaptive_guidance_eager"]
    assert [row.key for row in benchmark.rows] == [*ours, *(peer.key for peer in PEERS)]
    for row in benchmark.rows:
        if row.error is not None:
            assert not row.seconds
            continue
        assert len(row.seconds) == len(row.early) == len(row.late) == REPEAT
        assert row.first_seconds is not None
        assert row.extra is not None
        assert row.macs is not None
        assert row.macs > 0
    assert row_of(benchmark, "tgate_eager").strip == "FFFppp"


def test_failed_rows_have_a_reason(measured: tuple[Any, Benchmark]) -> None:
    _, benchmark = measured
    assert "not a CacheMixin" in str(row_of(benchmark, "first_block_cache").error)
    assert "identical to T-GATE v1" in str(row_of(benchmark, "tgate_v2_eager").error)
    for peer in PEERS:
        if peer.version is None:
            assert f"{peer.package} is not installed" in str(row_of(benchmark, peer.key).error)


def test_operations_are_counted_alike(measured: tuple[Any, Benchmark]) -> None:
    pipe, benchmark = measured
    optimize(pipe, GATE, backend="eager")
    try:
        tiny_pipelines.run(pipe, "red cat", steps=STEPS, guidance_scale=5.0)
        graphs = {variant.name: variant.macs for variant in describe(pipe).variants}
    finally:
        restore(pipe)
    plain, gated = row_of(benchmark, "plain"), row_of(benchmark, "tgate_eager")
    assert plain.macs == STEPS * graphs["full"]  # counted during the run, and in the graph
    assert gated.macs == GATE * graphs["full"] + (STEPS - GATE) * graphs["pruned"]
    # Two ways to stop guidance at the same step: ours, and diffusers' own callback.
    assert row_of(benchmark, "guidance_cutoff").macs == row_of(benchmark, "adaptive_guidance_eager").macs
    # Ours, and the authors'.
    for peer in PEERS:
        theirs = row_of(benchmark, peer.key)
        if peer.method == "tgate" and theirs.error is None:
            assert theirs.macs == gated.macs


def test_the_pipeline_and_its_class_stay_as_they_were(measured: tuple[Any, Benchmark]) -> None:
    pipe, _ = measured
    other = tiny_pipelines.stable_diffusion(layout="small")
    assert type(pipe) is type(other)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert "step" not in vars(pipe.scheduler)


def test_schedulers_that_draw_noise_draw_from_the_seed() -> None:
    pipe = tiny_pipelines.latent_consistency()
    call = {"prompt": "red cat", "num_inference_steps": 3}
    first, second = (timed_generation(pipe, call, seed=3).latents for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent").images)


def test_efficiency_is_speedup_over_saved_operations() -> None:
    plain = BenchmarkRow("plain", "plain", "", "plain", seconds=[4.0, 2.0, 3.0], macs=100.0)
    gated = BenchmarkRow("x", "x", "eager", "plain", first_seconds=9.0, seconds=[2.0, 2.0, 1.0], macs=60.0)
    on_runtime = BenchmarkRow("plain_ort", "y", "ort", "plain", seconds=[1.5], macs=100.0)
    both = BenchmarkRow("both", "z", "ort", "plain_ort", seconds=[1.0], macs=50.0)
    failed = BenchmarkRow("failed", "w", "", "plain", error="no")
    benchmark = Benchmark({}, {}, 10, 5, (plain, gated, on_runtime, both, failed))
    assert benchmark.speedup(gated) == 1.5
    assert benchmark.macs_ratio(gated) == pytest.approx(100 / 60)
    assert benchmark.efficiency(gated) == pytest.approx(1.5 / (100 / 60))
    assert benchmark.efficiency(both) == pytest.approx(1.5 / 2)  # over the plain row on the same runtime
    assert benchmark.efficiency(plain) is None
    assert benchmark.speedup(failed) is None
    assert gated.extra == 7.0
    json.dumps(benchmark.as_dict(), allow_nan=False)


@pytest.mark.heavy
def test_a_baseline_for_each_backend() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    task = Task({"prompt": "red cat", "guidance_scale": 5.0, "num_inference_steps": 2}, 2, 1, 1)
    methods = [method for method in methods_for(1) if method.key in ("plain", "tgate")]
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    benchmark = run_benchmark(pipe, task, methods, ["onnxruntime"], [])
    assert [row.key for row in benchmark.rows] == ["plain", "plain_onnxruntime", "tgate_onnxruntime"]
    assert [row.error for row in benchmark.rows] == [None] * 3
    alone = row_of(benchmark, "plain_onnxruntime")
    assert alone.strip == "FF"
    assert alone.macs == row_of(benchmark, "plain").macs
    assert row_of(benchmark, "tgate_onnxruntime").baseline == alone.key


def test_torch_compile_compiles_each_model_for_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo remembers the sizes of an earlier model with the same code, and would compile this one for free sizes."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: seen.append(options) or module)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append("reset"))
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    task = Task({"prompt": "red cat", "num_inference_steps": 2}, 2, 1, 1)
    benchmark = run_benchmark(pipe, task, methods_for(1)[:1], ["inductor", CUDA_GRAPHS], [])
    assert [row.key for row in benchmark.rows] == ["plain", "plain_compiled", "plain_compiled_cuda_graphs"]
    assert seen[0] == "reset"
    assert [options["dynamic"] for options in seen[1:]] == [False, False]
    assert [options["mode"] for options in seen[1:]] == [None, "reduce-overhead"]


def test_operations_of_layers_only() -> None:
    layer = torch.nn.Linear(8, 4)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with macs_counted({"a": layer}) as count:
        layer(torch.ones(3, 8))
        layer(torch.ones(2, 5, 8))
    assert count.macs == (3 + 10) * 8 * 4
    assert not layer._forward_hooks
    x = torch.ones(1, 6, 8)
    with macs_counted({"a": attention}) as count:
        attention(x, x, x, need_weights=False)
    assert count.macs == 6 * 8 * 8 * 4  # q, k, v and out, without q times k


def test_a_separate_class() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    kind = type(pipe)
    changed = with_private_class(pipe)
    assert type(changed) is not kind
    assert type(changed).__name__ == kind.__name__
    assert isinstance(changed, kind)


def test_random_models_are_known_by_name() -> None:
    assert set(NAMES) == {"sd15", "sd21", "sdxl", "pixart_alpha"}
    with pytest.raises(ConfigurationError, match="sd15, sd21, sdxl, pixart_alpha"):
        random_pipeline("sd3", torch.device("cpu"), torch.float32)


def test_random_models_have_the_real_size() -> None:
    pipe, call = random_pipeline("sdxl", torch.device("meta"), torch.float16, size=512)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 2_567_463_684
    assert call["prompt_embeds"].shape == (1, 77, 2048)
    assert call["height"] == 512
    pipe, call = random_pipeline("pixart_alpha", torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in pipe.transformer.parameters()) == 611_349_152
    assert call["prompt_embeds"].shape == (1, 120, 4096)


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_pipelines.latent_consistency().save_pretrained(folder)
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", "-m", str(folder), "--backend", "eager", "--method", "tgate", "--peer", "first_block_cache"]
    arguments += ["--steps", "4", "--gate-step", "2", "--repeat", "1", "-p", "red cat", "-o", str(out)]
    save_schedule(Schedule(3), tmp_path / "mine.json")
    arguments += ["--schedule", str(tmp_path / "mine.json")]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert "T-GATE v1, eager" in result.stdout
    assert "not a CacheMixin" in result.stdout
    data = json.loads(out.read_text())
    assert [row["key"] for row in data["rows"]] == ["plain", "tgate_eager", "schedule_mine_eager", "first_block_cache"]
    assert [row["strip"] for row in data["rows"][1:3]] == ["ffpp", "fffp"]
    assert data["rows"][1]["macs_ratio"] > 1
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr
    wrong = run(app, ["bench", "--peer", "nobody"])
    assert wrong.exit_code == 1
    assert "--peer must be one of tgate_authors" in wrong.stderr


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Hide these modules, as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--backend", "onnxruntime"], "pip install 'tgate_compile[onnx]'"),
        (["--peer", "cache_dit"], "pip install cache-dit"),
        (["--model", "random:sd3"], "sd15, sd21, sdxl, pixart_alpha"),
        (["--schedule", "none.json"], "cannot be read"),
    ],
)
def test_missing_packages_are_reported_before_a_model_is_loaded(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime", "cache_dit")
    monkeypatch.setattr(loading, "load", None)
    result = run(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert shown in result.stderr


def test_peers_that_are_not_installed_are_not_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "tgate", "DeepCache", "cache_dit")
    ours = ["guidance_cutoff", "first_block_cache", "pyramid_attention", "faster_cache"]
    assert [peer.key for peer in _peers(None)] == ours
    assert "pip install tgate DeepCache cache-dit." in " ".join(capsys.readouterr().err.split())


def test_the_backends_that_are_there() -> None:
    assert _backends(None, "cpu", None)[0] == "eager"
    assert not {"tensorrt", CUDA_GRAPHS} & set(_backends(None, "cpu", None))
    assert _backends([Backend("inductor")], "cpu", False) == ["inductor"]
    with pytest.raises(ConfigurationError, match="--cuda-graphs needs a CUDA GPU"):
        _backends([Backend("inductor")], "cpu", True)
