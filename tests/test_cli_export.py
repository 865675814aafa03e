"""`tgate-compile export` and `inspect`: a bundle that loads, and its description."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

import tgate_compile
from tests import tiny_pipelines
from tests.comparing import difference
from tests.exported import exported
from tgate_compile._cli.app import app
from tgate_compile.bundle.export import _stages
from tgate_compile.bundle.read import read_bundle

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny pipeline whose weights are large compared with its graphs, as in real ones."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_pipelines.stable_diffusion(layout="small", block_out_channels=(256,)).save_pretrained(folder)
    return str(folder)


@pytest.mark.heavy
def test_a_bundle_from_the_command_line(model: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    quick = ["--steps", "4", "--gate-step", "2", "--guidance", "5"]
    result = run(app, ["export", "--model", model, "--out", str(out), *quick])
    assert result.exit_code == 0, result.output
    for stage in (
        "Loading the model",
        "Capturing",
        "Converting the full",
        "Converting the pruned",
        "Checking",
        "Hashing",
    ):
        assert stage in result.stderr
    assert str(out) in result.stdout

    manifest = read_bundle(out).manifest
    assert manifest.example.strip == "FFpp"
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    weights = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert weights < sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= 1.02 * weights

    tgate_compile.optimize(pipe, 2, backend="eager")
    expected = tiny_pipelines.run(pipe, steps=4, guidance_scale=5.0)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, out)
    assert difference(tiny_pipelines.run(pipe, steps=4, guidance_scale=5.0), expected) < 1e-4

    again = run(app, ["export", "--model", model, "--out", str(out), *quick])
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    assert "Loading" not in again.stderr


def test_inspect() -> None:
    bundle = exported()
    result = run(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    for part in ("StableDiffusionPipeline", "gate step 3", "FFFppp", "graphs/weights.bin", "verified: 6 files"):
        assert part in result.stdout
    printed = json.loads(run(app, ["inspect", str(bundle), "--json"]).stdout)
    assert printed["verified"] is True
    assert printed["manifest"]["graphs"]["pruned"]["phase"]["reuse"] == ["cross"]


def test_inspect_something_else(tmp_path: Path) -> None:
    result = run(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr


def test_wrong_options(tmp_path: Path) -> None:
    result = run(app, ["export", "--format", "floppy", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    result = run(app, ["export", "--schedule", "x.json", "--gate-step", "3", "--out", str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "--gate-step" in result.stderr


def test_stages_are_logged_and_reported(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    with caplog.at_level(logging.INFO, "tgate_compile"):
        with _stages(seen.append) as report:
            report("Capturing the graphs")
        with _stages(None) as report:
            report("Hashing")
    assert seen == ["Capturing the graphs"]
    assert caplog.messages == ["Capturing the graphs", "Hashing"]
    assert "[00:" not in capsys.readouterr().err  # progress bars are for terminals only
