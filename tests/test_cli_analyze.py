"""`tgate-compile analyze`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile._cli import loading
from tgate_compile._cli.app import app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny Stable Diffusion pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipelines.stable_diffusion(layout="small").save_pretrained(folder)
    return str(folder)


def test_it_writes_json_and_pictures(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\n")
    out, plots, pictures = tmp_path / "new" / "a.json", [tmp_path / "a.png", tmp_path / "a.svg"], tmp_path / "p.png"
    chosen = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "4", "--guidance", "5", "--switch-step", "2"]
    drawn = [word for plot in plots for word in ("--plot", str(plot))]
    arguments = ["analyze", "-m", model, *chosen, "-o", str(out), *drawn, "--pictures", str(pictures)]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed, written = json.loads(result.stdout), json.loads(out.read_text())
    assert printed == {"model": model} | written | {"written": [str(out), *map(str, plots), str(pictures)]}
    assert written["prompts"] == ["red cat", "blue dog"]
    assert written["trajectories"]["text_first"]["steps"] == [2]
    assert all(path.stat().st_size > 5_000 for path in (*plots, pictures))
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_it_prints_a_table(model: str) -> None:
    arguments = ["analyze", "-m", model, "-p", "red cat", "--steps", "4", "--no-self", "--no-trajectories"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert "cross change" in result.stdout
    assert "self change" not in result.stdout
    assert "drift" not in result.stdout
    assert "converge" in result.stdout or "suggests gate step" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "--prompt"),
        (["-p", "red cat", "--prompts", "a.txt"], "not both"),
        (["-p", "red cat", "--plot", "a.gif"], "a.gif"),
        (["-p", "red cat", "--pictures", "a.txt"], "a.txt"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    result = run(app, ["analyze", "-m", "model", *arguments])
    assert result.exit_code == 1
    assert shown in result.stderr
