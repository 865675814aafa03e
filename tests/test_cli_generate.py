"""`tgate-compile generate` writes the library's image with its settings inside, and refuses bad input early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile import Schedule, optimize, save_schedule
from tgate_compile._cli import loading
from tgate_compile._cli import loading as checkpoints
from tgate_compile._cli.app import app
from tgate_compile._runtimes import automatic_backends

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

run = CliRunner().invoke
EAGER = ["--backend", "eager"]
QUICK = ["--steps", "4", "--gate-step", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny Stable Diffusion pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipelines.stable_diffusion().save_pretrained(folder)
    return str(folder)


def generated(model: str | None, out: Path, *arguments: str) -> dict[str, Any]:
    chosen = [] if model is None else ["--model", model]
    result = run(app, ["generate", *chosen, "--prompt", "red cat", "--out", str(out), "--json", *arguments, *EAGER])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def pixels(path: Path | str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


def test_the_image_is_the_librarys(model: str, tmp_path: Path) -> None:
    data = generated(model, tmp_path / "cat.png", *QUICK, "--scheduler", "euler", "--guidance", "5")
    assert data["strip"] == "FFpp"
    assert (data["family"], data["scheduler"]) == ("Stable Diffusion", "EulerDiscreteScheduler")
    pipe = checkpoints.DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = tiny_pipelines.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    optimize(pipe, 2, backend="eager")
    generator = torch.Generator().manual_seed(3)
    expected = pipe("red cat", num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0]
    assert np.array_equal(pixels(tmp_path / "cat.png"), np.asarray(expected, dtype=np.int64))


def test_without_tgate_it_is_the_plain_pipelines(model: str, tmp_path: Path) -> None:
    plain = generated(model, tmp_path / "plain.png", *QUICK, "--no-tgate")
    never = generated(model, tmp_path / "never.png", "--steps", "4", "--gate-step", "4", "--seed", "3")
    gated = generated(model, tmp_path / "gated.png", *QUICK)
    assert (plain["strip"], never["strip"], gated["strip"]) == ("FFFF", "FFFF", "FFpp")
    assert plain["gate_step"] is None
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "never.png"))
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "gated.png"))


@pytest.mark.parametrize(
    ("arguments", "strip", "schedule"),
    [
        (
            ["--gate-step", "4", "--sp-interval", "2", "--warm-up", "0"],
            "FSFFpp",
            "gate step 4, sp interval 2, warm up 0",
        ),
        (["--guidance-step", "2"], "FFffff", "guidance step 2"),
        pytest.param(["--deepcache-interval", "3"], "FDDFDD", "deepcache interval 3", marks=pytest.mark.heavy),
        (["--deepcache-interval", "3", "--gate-step", "3"], "FDFprr", "gate step 3, deepcache interval 3"),
        pytest.param(
            *(["--anchor-weight", "1", "--gate-step", "2"], "FFpppp", "gate step 2, anchor weight 1.0"),
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_any_schedule(model: str, tmp_path: Path, arguments: list[str], strip: str, schedule: str) -> None:
    data = generated(model, tmp_path / "cat.png", "--steps", "6", *arguments)
    assert (data["strip"], data["schedule"]) == (strip, schedule)


def test_a_schedule_file(model: str, tmp_path: Path) -> None:
    save_schedule(Schedule(3, keep="cond"), tmp_path / "schedule.json")
    file = ["--schedule", str(tmp_path / "schedule.json")]
    data = generated(model, tmp_path / "cat.png", "--steps", "4", *file)
    assert (data["strip"], data["gate_step"], data["keep"]) == ("FFFp", 3, "cond")
    both = run(
        app, ["generate", "-m", model, "-p", "red cat", "-o", str(tmp_path / "b.png"), *file, "--gate-step", "2"]
    )
    assert both.exit_code == 1
    assert "Leave out --gate-step" in both.stderr


@pytest.mark.heavy
def test_a_measured_schedule(model: str, tmp_path: Path) -> None:
    arguments = ["generate", "-m", model, "-p", "red cat", "-o", str(tmp_path / "cat.png"), "--steps", "4"]
    result = run(app, [*arguments, "--gate-step", "auto", "--json"])
    assert result.exit_code == 0, result.output
    assert f"guidance 7.5, {json.loads(result.stdout)['schedule']}" in " ".join(result.stderr.split())
    both = run(app, [*arguments, "--force", "--gate-step", "auto", "--sp-interval", "2"])
    assert (both.exit_code, "Leave out --sp-interval" in both.stderr) == (1, True)


@pytest.mark.heavy
def test_the_chosen_settings_are_printed(model: str, tmp_path: Path) -> None:
    arguments = ["generate", "-m", model, "-p", "red cat", "-o", str(tmp_path / "cat.png")]
    result = run(app, [*arguments, "--steps", "3", "--guidance", "4", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert "dtype fp32, scheduler DPMSolverMultistepScheduler, gate step 1" in " ".join(result.stderr.split())
    fastest = automatic_backends("cpu")[0]
    assert json.loads(result.stdout)["backend"] == fastest


def test_each_image_of_a_batch_has_its_own_seed(model: str, tmp_path: Path) -> None:
    data = generated(model, tmp_path / "cats", *QUICK, "--num-images", "2", "--negative-prompt", "dog")
    assert [Path(path).name for path in data["images"]] == ["seed-3.png", "seed-4.png"]
    generated(model, tmp_path / "four.png", *QUICK[:-1], "4", "--negative-prompt", "dog")
    assert np.abs(pixels(data["images"][1]) - pixels(tmp_path / "four.png")).max() <= 1
    with Image.open(data["images"][1]) as image:
        image.load()
        texts = image.text  # type: ignore[attr-defined]
    assert texts["seed"] == "4"
    assert (texts["prompt"], texts["negative_prompt"]) == ("red cat", "dog")
    assert (texts["gate_step"], texts["steps"], texts["guidance"], texts["keep"]) == ("2", "4", "7.5", "uncond")


def test_sizes_and_sdxl(tmp_path: Path) -> None:
    tiny_pipelines.sdxl().save_pretrained(tmp_path / "model")
    out = tmp_path / "cat.png"
    data = generated(str(tmp_path / "model"), out, "--steps", "2", "--height", "16", "--width", "24", "--keep", "cond")
    assert pixels(out).shape == (16, 24, 3)
    # The family's settings: 10 of 25 steps become 1 of 2; DPM-Solver++ replaces Euler.
    assert (data["family"], data["strip"], data["keep"]) == ("SDXL", "Fp", "cond")
    assert (data["guidance"], data["scheduler"]) == (5.0, "DPMSolverMultistepScheduler")


def test_lcm_needs_no_guidance(model: str, tmp_path: Path) -> None:
    data = generated(model, tmp_path / "cat.png", "--scheduler", "lcm")
    assert (data["family"], data["steps"], data["guidance"], data["strip"]) == ("LCM", 4, 1.0, "fppp")


def test_fp16_files_are_found_and_not_needed(model: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    data = generated(str(tmp_path / "fp16"), tmp_path / "cat.png", *QUICK)
    assert data["dtype"] == "fp32"
    generated(model, tmp_path / "bf16.png", *QUICK, "--dtype", "bf16", "--no-tgate")


def test_the_result_is_printed(model: str, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    arguments = ["generate", "-m", model, "-p", "red cat", "-o", str(out), "--steps", "3", "--gate-step", "0.4"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    for shown in ("Fpp", "1 full, 2 pruned", "Stable Diffusion", "guidance 7.5", "cat.png"):
        assert shown in result.stdout
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_the_embedded_model_knows_its_own_captions_only(tmp_path: Path) -> None:
    arguments = ["generate", "-o", str(tmp_path), "--steps", "1", "--no-tgate"]
    known = run(app, [*arguments, "-p", "a large red circle on a blue background"])
    assert (known.exit_code, "Note" in known.stderr) == (0, False)
    unknown = run(app, [*arguments, "-p", "a fox in snow"])
    assert unknown.exit_code == 0
    assert "COLOUR SHAPE" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--gate-step", "0"], 2, "at least 1"),
        (["--gate-step", "1.5"], 2, "between 0 and 1"),
        (["--gate-step", "ten"], 2, "'ten'"),
        (["--steps", "0"], 2, "--steps"),
        (["--guidance", "-1"], 2, "--guidance"),
        (["--height", "100"], 2, "96 or 104"),
        (["--dtype", "int4"], 2, "--dtype"),
        (["--backend", "fast"], 2, "--backend"),
        (["--keep", "both"], 2, "--keep"),
        (["--model", "./nowhere"], 1, "There is no folder ./nowhere"),
        (["--model", "nowhere"], 1, "There is no folder nowhere"),
        (["--model", __file__], 1, "is not a checkpoint"),
        (["--model", str(Path(__file__).parent)], 1, "model_index.json"),
        (["--device", "tpu"], 1, "device must be"),
        (["--scheduler", "best"], 1, "scheduler must be one of"),
        (["--unet", "somebody/unet"], 1, "--model"),
    ],
)
def test_bad_input_is_refused_early(
    arguments: list[str], code: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints.DiffusionPipeline, "from_pretrained", None)
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "fox.png"
    result = run(app, ["generate", "-p", "a fox", "-o", str(out), *arguments])
    assert result.exit_code == code
    assert shown in result.stderr
    assert not out.exists()


def test_outputs_are_checked_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", None)
    (tmp_path / "fox.png").touch()
    for out, shown in (("fox.png", "already exists"), ("fox.png/a.png", "Cannot write"), ("fox.jpg", ".png")):
        result = run(app, ["generate", "-p", "a fox", "-o", str(tmp_path / out)])
        assert result.exit_code == 1
        assert shown in result.stderr


def test_lora_weights_change_the_image(model: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipelines.stable_diffusion()
    tiny_pipelines.add_lora(pipe.unet)
    type(pipe).save_lora_weights(tmp_path / "lora", peft.get_peft_model_state_dict(pipe.unet))
    generated(model, tmp_path / "plain.png", *QUICK, "--no-tgate")
    generated(model, tmp_path / "folder.png", *QUICK, "--no-tgate", "--lora", str(tmp_path / "lora"))
    file = next((tmp_path / "lora").iterdir())
    generated(model, tmp_path / "file.png", *QUICK, "--no-tgate", "--lora", str(file))
    assert np.array_equal(pixels(tmp_path / "folder.png"), pixels(tmp_path / "file.png"))
    assert not np.array_equal(pixels(tmp_path / "folder.png"), pixels(tmp_path / "plain.png"))


def test_another_unet_goes_in_and_is_recognised(model: str, tmp_path: Path) -> None:
    tiny_pipelines.stable_diffusion(time_cond_proj_dim=16).unet.save_pretrained(tmp_path / "unet")
    data = generated(model, tmp_path / "cat.png", "--unet", str(tmp_path / "unet"))
    assert (data["family"], data["scheduler"], data["guidance"]) == ("LCM, guidance embedded", "LCMScheduler", 8.0)
    assert data["strip"] == "fppp"


def test_a_lora_that_is_none_is_refused(model: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"no weights")
    result = run(app, ["generate", "-m", model, "-p", "a fox", "-o", str(tmp_path / "fox.png"), "--lora", str(lora)])
    assert result.exit_code == 1
    assert "lora.safetensors" in result.stderr
