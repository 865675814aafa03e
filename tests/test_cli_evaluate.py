"""`tgate-compile evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile import ConfigurationError, Schedule, save_schedule
from tgate_compile._cli import evaluate as evaluate_command
from tgate_compile._cli import loading
from tgate_compile._cli.app import app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny Stable Diffusion pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipelines.stable_diffusion(layout="small").save_pretrained(folder)
    return str(folder)


def test_it_fills_a_folder_and_goes_on_with_it(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\nold tree\n")
    save_schedule(Schedule(3), tmp_path / "mine.json")
    out, plot = tmp_path / "new" / "folder", tmp_path / "a.png"
    chosen = ["--prompts", str(tmp_path / "prompts.txt"), "--count", "2", "--steps", "4", "--guidance", "5"]
    contenders = ["-c", "early: gate-step=2, keep=cond", "-c", "steps=3", "--schedule", str(tmp_path / "mine.json")]
    arguments = ["evaluate", "-m", model, "-o", str(out), *chosen, *contenders]
    result = run(app, [*arguments, "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["label"] for row in data["rows"]] == ["plain", "early", "3 steps", "mine"]
    assert data["rows"][1]["schedule"]["keep"] == "cond"
    assert data["rows"][3]["strips"] == {"FFFp": 2}
    assert data["protocol"]["prompts"] == ["red cat", "blue dog"]
    assert data["protocol"]["call"] == {"guidance_scale": 5.0}
    assert plot.stat().st_size > 5_000
    with Image.open(out / "images" / "early" / "00001-0.png") as image:
        assert image.text["prompt"] == "blue dog"  # type: ignore[attr-defined]
    written = json.loads((out / "results.json").read_text())
    assert written["rows"] == data["rows"]

    again = run(app, arguments)
    assert again.exit_code == 0, again.output
    for shown in ("early", "PSNR", "not measured: fid", str(out / "results.json")):
        assert shown in again.stdout
    changed = run(app, [*arguments, "--seeds", "1"])
    assert changed.exit_code == 1
    assert "seeds" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-c", "gate_step=2"], "--prompt"),
        (["-p", "red cat"], "--contender"),
        (["-p", "red cat", "-c", "gate 2"], "expected the fields of a schedule"),
        (["-p", "red cat", "-c", "gate_steps=2"], "gate_steps"),
        (["-p", "red cat", "-c", "a: gate_step=2", "-c", "a: gate_step=3"], "called 'a'"),
        (["-p", "red cat", "-c", "steps=3", "--plot", "a.gif"], "a.gif"),
        (["-p", "red cat", "-c", "steps=3", "--clip", "nowhere"], "--clip nowhere does not exist"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    arguments: list[str], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    result = run(app, ["evaluate", "-m", "model", "-o", str(tmp_path / "a"), *arguments])
    assert result.exit_code == 1
    assert shown in result.stderr


def test_contenders_in_words() -> None:
    parsed = evaluate_command._parsed
    assert parsed("gate_step=0.4 sp-interval=5") == ("gate step 0.4, sp interval 5", Schedule(0.4, sp_interval=5))
    assert parsed("early: gate_step=3,anchor_weight=1.0") == ("early", Schedule(3, anchor_weight=1.0))
    assert parsed("guidance_step=5") == ("guidance step 5", Schedule(None, guidance_step=5))
    assert parsed("steps=15") == ("15 steps", 15)
    with pytest.raises(ConfigurationError, match="gate_step"):
        parsed("gate_step=0")


def test_the_embedded_model_has_default_contenders() -> None:
    contenders = evaluate_command._contenders([], [], embedded=True)
    assert Schedule(10) in contenders.values()
    assert 15 in contenders.values()
