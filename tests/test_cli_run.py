"""`tgate-compile run`, and `export --components all`: from a model to images without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests import tiny_pipelines
from tests.exported import exported
from tests.programs import program
from tests.tiny_pipelines import SIZE
from tgate_compile._cli.app import app
from tgate_compile.runtime import BundlePipeline

run = CliRunner().invoke


@pytest.fixture(scope="module")
def bundle() -> str:
    return str(program(dynamic=True))


def test_images(bundle: str, tmp_path: Path) -> None:
    two = ["--prompt", "red cat", "--prompt", "blue dog", "--seed", "3"]
    result = run(app, ["run", bundle, *two, "--out", str(tmp_path), "--steps", "7", "--threads", "1"])
    assert result.exit_code == 0, result.output
    for part in ("gate step 3", "7 steps of EulerDiscreteScheduler", "FFFpppp", "ms full", "ms pruned", "2 images"):
        assert part in result.stdout
    expected = BundlePipeline(bundle, threads=1)("blue dog", seed=4, num_inference_steps=7)
    with Image.open(tmp_path / "seed-4.png") as written:
        assert written.text["prompt"] == "blue dog"  # type: ignore[attr-defined]
        assert np.abs(np.asarray(written, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_options_and_json(bundle: str, tmp_path: Path) -> None:
    options = [
        "--negative-prompt",
        "cat",
        "--guidance",
        "3",
        "--gate-step",
        "0.5",
        "--scheduler",
        "ddim",
        "--no-verify",
    ]
    out = tmp_path / "fox.png"
    result = run(app, ["run", bundle, "-p", "red fox", "-o", str(out), *options, "--json", "--seed", "1"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["strip"], printed["guidance"], printed["scheduler"], printed["seeds"]) == (
        "FFFppp",
        3.0,
        "ddim",
        [1],
    )
    assert set(printed["seconds_per_step"]) == {"full", "pruned"}
    assert printed["images"] == [str(out)]
    again = run(app, ["run", bundle, "-p", "red fox", "-o", str(out)])
    assert again.exit_code == 1
    assert "already exists" in again.stderr


def test_bundles_that_cannot_be_run(tmp_path: Path) -> None:
    out = ["--prompt", "x", "--out", str(tmp_path / "x.png")]
    result = run(app, ["run", str(exported()), *out])
    assert result.exit_code == 1
    assert "--components all" in result.stderr
    result = run(app, ["run", str(tmp_path / "nothing"), *out])
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr


WITHOUT = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx"):
    sys.modules[name] = None
from tgate_compile._cli import main
main()
"""


def test_a_real_process_without_torch(bundle: str, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    arguments = [sys.executable, "-c", WITHOUT, "run", bundle, "--prompt", "red cat", "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as written:
        assert written.size == (SIZE, SIZE)


@pytest.mark.heavy
def test_from_a_model_to_an_image(tmp_path: Path) -> None:
    model, folder, out = (str(tmp_path / name) for name in ("model", "bundle", "cat.png"))
    tiny_pipelines.stable_diffusion(layout="small").save_pretrained(model)
    options = ["--steps", "4", "--gate-step", "2", "--static", "--components", "all"]
    result = run(app, ["export", "--model", model, "--out", folder, *options])
    assert result.exit_code == 0, result.output
    for stage in ("Converting the text_encoder", "Checking the vae_decoder"):
        assert stage in result.stderr
    result = run(app, ["inspect", folder])
    assert result.exit_code == 0, result.output
    for part in ("CLIPTextModel, 16 tokens", "AutoencoderKL", f"images of {SIZE}x{SIZE} in 4 steps", "tokenizer.json"):
        assert part in result.stdout
    result = run(app, ["run", folder, "--prompt", "red cat", "--out", out])
    assert result.exit_code == 0, result.output
    assert Path(out).is_file()
