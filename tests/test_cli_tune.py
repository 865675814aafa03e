"""`tgate-compile tune` and `tgate-compile strip`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile._cli import loading
from tgate_compile._cli.app import app
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import load_schedule, save_schedule

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny Stable Diffusion pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipelines.stable_diffusion(layout="small").save_pretrained(folder)
    return str(folder)


def test_tuning_writes_the_schedule_and_the_plot(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("red cat\n\n  blue dog \n")
    out, plot = tmp_path / "new" / "schedule.json", tmp_path / "tune.png"
    chosen = ["--prompts", str(tmp_path / "prompts.txt"), "--tolerance", "0.5", "--steps", "5", "--guidance", "5"]
    arguments = ["tune", "-m", model, *chosen, "-o", str(out), "--plot", str(plot)]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert load_schedule(out) == Schedule(**data["schedule"])
    assert (data["prompts"], data["seeds"], data["num_steps"]) == (["red cat", "blue dog"], [0], 5)
    assert data["call"] == {"guidance_scale": "5.0"}
    assert data["written"] == {"out": str(out), "plot": str(plot)}
    assert len(data["strip"]) == 5
    assert plot.stat().st_size > 10_000
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_tuning_prints_its_table(model: str) -> None:
    result = run(app, ["tune", "-m", model, "-p", "red cat", "--tolerance", "0.5", "--steps", "4", "--seeds", "3"])
    assert result.exit_code == 0, result.output
    for shown in ("guidance step 2", "gate step 2", "drift", "tolerance 0.5", "4 steps of DPMSolverMultistepScheduler"):
        assert shown in result.stdout
    assert "%" not in result.stdout  # progress goes to stderr
    refused = run(app, ["tune", "-m", model, "-p", "red cat", "--tolerance", "0"])
    assert refused.exit_code == 1
    assert "tolerance must" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "--prompt"),
        (["-p", "red cat", "--prompts", "a.txt"], "not both"),
        (["--prompts", "none.txt"], "No such file"),
        (["-p", "red cat", "--plot", "tune.gif"], "tune.gif"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    result = run(app, ["tune", "-m", "model", *arguments])
    assert result.exit_code == 1
    assert shown in result.stderr


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    for content, shown in ((b"\n \n", "no prompts"), (b"\xff", "UTF-8")):
        (tmp_path / "prompts.txt").write_bytes(content)
        result = run(app, ["tune", "--prompts", str(tmp_path / "prompts.txt")])
        assert result.exit_code == 1
        assert shown in result.stderr


def test_the_strip_with_its_legend() -> None:
    result = run(app, ["strip", "--gate-step", "9", "--sp-interval", "5", "--steps", "12"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["gate step 9, sp interval 5, 12 steps", "FFFSSFSSFppp"]
    assert [line.split(maxsplit=3) for line in lines[2:]] == [
        ["F", "5", "x", "full, guided"],
        ["S", "4", "x", "self-reused, guided"],
        ["p", "3", "x", "pruned, no guidance: half the batch"],
    ]


@pytest.mark.parametrize(
    ("arguments", "strip"),
    [
        (["--deepcache-interval", "3", "--gate-step", "6", "--steps", "12"], "FDDFDFprrprr"),
        (["--guidance-step", "0.5", "--steps", "4"], "FFff"),
        (["--gate-step", "2", "--steps", "4", "--guidance", "1"], "ffpp"),
        (["--gate-step", "4", "--fi-interval", "2", "--warm-up", "1", "--steps", "7"], "FFFFpqp"),
    ],
)
def test_strips_as_json(arguments: list[str], strip: str) -> None:
    result = run(app, ["strip", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["strip"] == strip


def test_the_strip_of_a_file_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_schedule(Schedule(0.4), tmp_path / "schedule.json")
    arguments = ["strip", "--schedule", str(tmp_path / "schedule.json"), "--steps", "10"]
    out = tmp_path / "strip.svg"
    result = run(app, [*arguments, "--plot", str(out)])
    assert result.exit_code == 0, result.output
    assert "FFFFpppppp" in result.stdout
    assert out.read_text().count("pruned, no guidance") == 1
    for wrong, shown in (
        ([*arguments, "--plot", str(out)], "--force"),
        ([*arguments, "--sp-interval", "2", "--gate-step", "3"], "--gate-step, --sp-interval"),
        (["strip", "--gate-step", "3", "--plot", str(tmp_path / "a.bmp")], "a.bmp"),
        (["strip"], "Nothing to do"),
        (["strip", "--gate-step", "auto"], "tgate-compile tune"),
        (["strip", "--guidance-similarity", "0.99"], "known only while images are made"),
    ):
        refused = run(app, wrong)
        assert refused.exit_code == 1
        assert shown in refused.stderr


def test_a_budget_that_is_none(model: str) -> None:
    result = run(app, ["tune", "-m", model, "--prompt", "red cat", "--budget", "50"])
    assert result.exit_code != 0
    assert "budget must be a number between 0 and 1" in " ".join(result.output.split())
