"""Bundles run without PyTorch make the images of the pipelines in PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import tgate_compile
from tests.exported import GATE, exported
from tests.programs import noise, program, psnr, reference
from tests.tiny_pipelines import PROMPT, PROMPTS, SIZE, VELOCITY
from tgate_compile import BackendError, BundleError, ConfigurationError
from tgate_compile.runtime import BundlePipeline, Step

pytestmark = pytest.mark.heavy

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}
#: PSNR of float32 images that differ only by rounding.
CLOSE = 90.0


@pytest.fixture(scope="module")
def pipe() -> BundlePipeline:
    return BundlePipeline(program(dynamic=True), threads=1)


@pytest.fixture(scope="module")
def unguided() -> BundlePipeline:
    return BundlePipeline(program(dynamic=False, call=(("guidance_scale", 1.0),)), threads=1)


def made(pipe: BundlePipeline, *args: Any, **call: Any) -> Any:
    return pipe(*args, output="numpy", **call)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 50.0), (torch.float16, 35.0)])
def test_the_embedded_pipeline(dtype: torch.dtype, least: float, tmp_path: Path) -> None:
    torch_pipe = tgate_compile.load_demo_pipeline(torch_dtype=dtype)
    torch_pipe.set_progress_bar_config(disable=True)
    config = torch_pipe.scheduler.config
    tgate_compile.optimize(torch_pipe, 4, backend="eager")
    call = {"prompt": "", "num_inference_steps": 10}
    folder = tgate_compile.export(torch_pipe, tmp_path / "b", call=call, dynamic=("batch",), components="all")
    pipe = BundlePipeline(folder, threads=1)
    prompts = ["a large red circle on a blue background", "a small green star on a white background"]
    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    others = CLASSES if dtype is torch.float32 else {}  # float16 is slow on a CPU
    for scheduler, name in {None: CLASSES["dpm++"], **others}.items():
        torch_pipe.scheduler = getattr(diffusers, name).from_config(config)
        for prompt, latents in ((prompts, noise), (prompts[0], noise[:1])):
            expected = torch_pipe(prompt, latents=latents, num_inference_steps=10, output_type="np").images
            images = made(pipe, prompt, latents=latents.numpy(), scheduler=scheduler)
            assert psnr(np.reshape(images, expected.shape), expected) >= least


@pytest.mark.parametrize("scheduler", list(CLASSES))
def test_calls(pipe: BundlePipeline, scheduler: str) -> None:
    own = getattr(diffusers, CLASSES[scheduler])(**VELOCITY, timestep_spacing="linspace")
    for prompt, latents, call in (
        (PROMPT, noise(), {}),
        (PROMPTS, noise(2), {"negative_prompt": ["cat", "dog"], "num_inference_steps": 7}),
        (PROMPT, noise(), {"gate_step": 5, "guidance_scale": 3.0}),
        (PROMPT, noise(), {"gate_step": 0.4, "negative_prompt": "cat", "num_inference_steps": 9}),
        (PROMPT, noise(1, 2 * SIZE), {"height": 2 * SIZE, "width": 2 * SIZE}),
    ):
        expected = reference(prompt, latents, scheduler=own, **call)
        images = made(pipe, prompt, latents=latents, scheduler=scheduler, **call)
        assert psnr(np.reshape(images, expected.shape), expected) > CLOSE, call


def test_a_step_of_several_calls(pipe: BundlePipeline) -> None:
    """PNDM's first step has more than one call, but is reported once."""
    done: list[Step] = []
    pipe(PROMPT, seed=0, num_inference_steps=6, scheduler="pndm", callback=done.append)
    assert [(step.number, step.steps) for step in done] == [(number, 6) for number in range(6)]


@pytest.mark.parametrize(
    "schedule",
    [
        {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0},
        {"gate_step": None, "guidance_step": 4, "deepcache_interval": 3},
    ],
)
def test_other_schedules(schedule: dict[str, Any]) -> None:
    pipe = BundlePipeline(program(dynamic=False, call=(("num_inference_steps", 9),), **schedule), threads=1)
    expected = reference(PROMPT, noise(), schedule=schedule, num_inference_steps=11)
    assert psnr(made(pipe, PROMPT, latents=noise(), num_inference_steps=11)[None], expected) > CLOSE


def test_without_guidance(unguided: BundlePipeline) -> None:
    expected = reference(PROMPT, noise(), guidance_scale=1.0)
    assert psnr(made(unguided, PROMPT, latents=noise())[None], expected) > CLOSE
    with pytest.raises(BundleError, match=r"no graph .*full, with guidance.*It has full-unguided, pruned"):
        unguided(PROMPT, guidance_scale=2.0)


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_other_pipelines(name: str) -> None:
    """SDXL uses zeros if no negative prompt is given."""
    pipe = BundlePipeline(program(name), threads=1)
    for prompt, call in (
        (PROMPT, {}),
        (PROMPT, {"negative_prompt": "cat"}),
        (PROMPTS, {}),
        (PROMPTS, {"negative_prompt": ["cat", ""]}),
    ):
        latents = noise(1 if prompt is PROMPT else 2)
        expected = reference(prompt, latents, name, **call)
        images = made(pipe, prompt, latents=latents, **call)
        assert psnr(np.reshape(images, expected.shape), expected) > CLOSE, call


@pytest.mark.parametrize(
    "schedule",
    [
        {"gate_step": None, "guidance_step": GATE},
        pytest.param({"gate_step": GATE}, marks=pytest.mark.heavy),  # the text's keys and values are caches
    ],
)
def test_flow_matching_with_two_pooled_texts_and_shifted_latents(schedule: dict[str, Any]) -> None:
    pipe = BundlePipeline(program("sd3", **schedule), threads=1)
    for prompt, call in ((PROMPT, {"negative_prompt": "cat"}), (PROMPTS, {"num_inference_steps": 9})):
        latents = noise(1 if prompt is PROMPT else 2)
        expected = reference(prompt, latents, "sd3", schedule=schedule, **call)
        images = made(pipe, prompt, latents=latents, **call)
        assert psnr(np.reshape(images, expected.shape), expected) > CLOSE, call


def test_seeds_and_output_types(pipe: BundlePipeline) -> None:
    steps: list[Step] = []
    both = pipe(PROMPTS, seed=4, callback=steps.append)
    assert isinstance(both, list)
    assert [image.size for image in both] == [(SIZE, SIZE)] * 2
    second = pipe(PROMPTS[1], seed=5)
    assert np.abs(np.asarray(second, dtype=int) - np.asarray(both[1], dtype=int)).max() <= 1
    assert np.abs(np.asarray(both[0], dtype=int) - np.asarray(both[1], dtype=int)).max() > 10
    assert "".join(step.letter for step in steps) == "FFFppp"
    assert [step.graph for step in steps] == ["full"] * 3 + ["pruned"] * 3
    assert [step.number for step in steps] == list(range(6))
    assert steps[0].latents.shape == (2, 4, SIZE // 2, SIZE // 2)
    assert made(pipe, PROMPT).shape == (SIZE, SIZE, 3)
    assert not np.array_equal(made(pipe, PROMPT), made(pipe, PROMPT))


def test_two_threads() -> None:
    pipe = BundlePipeline(program(dynamic=True), threads=1)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda seed: made(pipe, PROMPT, seed=seed), (1, 2)))
    for seed, image in zip((1, 2), both, strict=True):
        assert np.array_equal(image, made(pipe, PROMPT, seed=seed))


def test_a_prompt_that_is_too_long(pipe: BundlePipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe("red " * 20)
    assert "more than the 16 tokens" in caplog.text


# Without torch.

PROGRAM = """
import json, sys
from tgate_compile.runtime import BundlePipeline
image = BundlePipeline(sys.argv[1], threads=1)("red cat", seed=0)
loaded = [name for name in ("torch", "diffusers", "transformers", "onnx", "scipy") if name in sys.modules]
print(json.dumps({"size": image.size, "loaded": loaded}))
"""


def test_it_imports_no_torch(pipe: BundlePipeline) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(program(dynamic=True))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"size": [SIZE, SIZE], "loaded": []}


# Refusals.


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ({"prompt": 3}, ("prompt", "got 3")),
        ({"prompt": []}, ("prompt", "got []")),
        ({"negative_prompt": ["a", "b"]}, ("negative_prompt", "1 strings")),
        ({"num_inference_steps": 0}, ("num_inference_steps", "from 1 to 1000")),
        ({"guidance_scale": "7"}, ("guidance_scale", "'7'")),
        ({"seed": -1}, ("seed", "-1")),
        ({"height": 17}, ("height", "multiple of 2", "17")),
        ({"width": 0}, ("width", "multiple of 2", "0")),
        ({"latents": np.zeros((1, 4, 4, 4), dtype=np.float32)}, ("latents", "(1, 4, 8, 8)", "(1, 4, 4, 4)")),
        ({"scheduler": "heun"}, ("'heun'", "'ddim', 'euler', 'dpm++', 'pndm'")),
        ({"gate_step": 0}, ("gate_step", "0")),
        ({"output": "jpg"}, ("output", "'jpg'")),
    ],
)
def test_wrong_arguments(pipe: BundlePipeline, call: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        pipe(**{"prompt": PROMPT, **call})
    for part in parts:
        assert part in str(caught.value)


def test_shapes_that_the_bundle_is_not_made_for(pipe: BundlePipeline, unguided: BundlePipeline) -> None:
    with pytest.raises(BundleError, match=r"sample \[1, 4, 8, 8\].*sample \[2, 4, 8, 8\]"):
        unguided(PROMPTS)
    with pytest.raises(BundleError, match="height must be 16 pixels, not 32"):
        unguided(PROMPT, height=32, width=32)
    with pytest.raises(BundleError, match="supports b from 1 to"):
        pipe([PROMPT] * 40, num_inference_steps=1)


def test_bundles_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r'only the denoiser.*components="all"'):
        BundlePipeline(exported())
    with pytest.raises(BundleError, match="is not a bundle"):
        BundlePipeline(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no NoSuchProvider.*CPUExecutionProvider"):
        BundlePipeline(program(dynamic=True), providers=["NoSuchProvider"])
    with pytest.raises(ConfigurationError, match=r"threads.*0"):
        BundlePipeline(program(dynamic=True), threads=0)


def test_damage(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(program(dynamic=True), tmp_path / "bundle"))
    for name in ("graphs/full.onnx", "components/tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:100] + b"\0" + content[101:])
        with pytest.raises(BundleError, match=f"{name} has been changed"):
            BundlePipeline(folder)
    unverified = BundlePipeline(folder, verify=False)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a file of the tokenizers library"):
        unverified(PROMPT)
    shutil.copy(program(dynamic=True) / "components/tokenizer.json", folder / "components/tokenizer.json")
    with pytest.raises((BackendError, BundleError), match=r"full\.onnx"):
        unverified(PROMPT)
