"""The family of a checkpoint is detected from the loaded pipeline, and determines the paper's settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from tests import tiny_pipelines
from tests.tiny_joint import JOINT
from tgate_compile._cli.loading import MSG_DEVICE, Loaded, _may_replace, choose_device, choose_dtype, set_scheduler
from tgate_compile._cli.options import FAMILIES, SCHEDULERS, Dtype, gpu_dtype, recognise
from tgate_compile._cli.settings import settings_for
from tgate_compile._errors import ConfigurationError

CPU = torch.device("cpu")


def lcm(pipe: Any) -> Any:
    pipe.scheduler = LCMScheduler()
    return pipe


def embedded_guidance() -> Any:
    return tiny_pipelines.stable_diffusion(time_cond_proj_dim=16)


def schnell() -> Any:
    pipe = JOINT["FluxPipeline"].build()
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def playground() -> Any:
    return tiny_pipelines.sdxl(scheduler=EDMDPMSolverMultistepScheduler())


@pytest.mark.parametrize(
    ("build", "name", "steps", "guidance", "gate"),
    [
        (tiny_pipelines.stable_diffusion, "Stable Diffusion", 25, 7.5, 10),
        (tiny_pipelines.sdxl, "SDXL", 25, 5.0, 10),
        (tiny_pipelines.pixart, "PixArt", 25, 4.5, 8),
        (lambda: tiny_pipelines.pixart("PixArtSigmaPipeline"), "PixArt", 25, 4.5, 8),
        (playground, "Playground v2.5", 25, 3.0, 10),
        (lambda: lcm(tiny_pipelines.stable_diffusion()), "LCM", 4, 1.0, 1),
        (lambda: lcm(tiny_pipelines.sdxl()), "LCM", 4, 1.0, 1),
        (lambda: lcm(tiny_pipelines.pixart()), "PixArt LCM", 4, 0.0, 1),
        (embedded_guidance, "LCM, guidance embedded", 4, 8.0, 1),
        (tiny_pipelines.controlnet, "unknown", 25, 5.0, 10),
        (JOINT["StableDiffusion3Pipeline"].build, "StableDiffusion3", 28, 7.0, 11),
        (JOINT["FluxPipeline"].build, "Flux", 28, 3.5, 11),  # the guidance scale is an input
        (schnell, "FLUX.1 schnell", 4, 0.0, 1),
        (JOINT["QwenImagePipeline"].build, "QwenImage", 50, 4.0, 20),
        (JOINT["ZImagePipeline"].build, "ZImage", 50, 5.0, 20),
    ],
)
def test_families_are_recognised(build: Any, name: str, steps: int, guidance: float, gate: int) -> None:
    family = recognise(build())
    assert (family.name, family.steps, family.guidance, family.gate_step) == (name, steps, guidance, gate)


def test_arguments_of_models_with_joint_attention() -> None:
    qwen = recognise(JOINT["QwenImagePipeline"].build())
    assert (qwen.scale, dict(qwen.call)) == ("true_cfg_scale", {"negative_prompt": " "})
    loaded = Loaded(None, qwen, "", CPU, "fp32")  # type: ignore[arg-type]
    assert {**loaded.call, **loaded.guided(3.0)} == {"negative_prompt": " ", "true_cfg_scale": 3.0}
    flux = recognise(JOINT["FluxPipeline"].build())
    assert (flux.scale, flux.call) == ("guidance_scale", ())
    for name in ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "Flux2KleinPipeline"):
        assert gpu_dtype(name) == "bf16"  # fp16 overflows in some of them
    assert gpu_dtype("StableDiffusionPipeline") == gpu_dtype("NoSuchPipeline") == "fp16"


def test_every_row_can_be_reached_and_the_last_takes_all() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    last = FAMILIES[-1]
    assert last.pipelines is None
    assert last.schedulers is None
    assert last.guidance_embedded is None
    assert {family.scheduler for family in FAMILIES} - {None} <= SCHEDULERS.keys()


def test_the_scheduler_of_old_checkpoints_is_replaced_and_that_of_distilled_ones_kept() -> None:
    family = recognise(tiny_pipelines.stable_diffusion())
    assert _may_replace(PNDMScheduler(), family)
    assert _may_replace(EulerDiscreteScheduler(), family)
    assert not _may_replace(EulerDiscreteScheduler(timestep_spacing="trailing"), family)
    assert not _may_replace(LCMScheduler(), family)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("edm")])
def test_every_scheduler_goes_in_with_the_checkpoints_noise(name: str) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    before = dict(pipe.scheduler.config)
    set_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name][0]
    assert pipe.scheduler.config.beta_end == before["beta_end"]
    assert pipe.scheduler.config.prediction_type == before["prediction_type"]


def loaded(pipe: Any) -> Loaded:
    return Loaded(pipe, recognise(pipe), "somewhere", CPU, "fp32")


def test_the_gate_moves_along_with_the_steps() -> None:
    model = loaded(tiny_pipelines.stable_diffusion())
    assert settings_for(model, steps=None, guidance=None, gate_step=None).gate == 10
    assert settings_for(model, steps=50, guidance=None, gate_step=None).gate == 20
    assert settings_for(model, steps=1, guidance=None, gate_step=None).gate == 1
    assert settings_for(model, steps=50, guidance=None, gate_step=0.5).gate == 25
    assert settings_for(model, steps=50, guidance=2.0, gate_step=7).gate == 7


def test_a_gate_after_the_last_step_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(tiny_pipelines.stable_diffusion())
    settings_for(model, steps=5, guidance=None, gate_step=9)
    assert "nothing is gated" in capsys.readouterr().err
    settings_for(model, steps=5, guidance=None, gate_step=9, tgate=False)
    assert not capsys.readouterr().err


def test_number_formats() -> None:
    gpu = torch.device("mps")
    assert choose_dtype(Dtype.auto, "PixArtAlphaPipeline", CPU) is Dtype.fp32
    assert choose_dtype(Dtype.auto, "StableDiffusionXLPipeline", gpu) is Dtype.fp16
    assert choose_dtype(Dtype.auto, "PixArtSigmaPipeline", gpu) is Dtype.bf16
    assert choose_dtype(Dtype.auto, "SomethingNew", gpu) is Dtype.fp16
    assert choose_dtype(Dtype.bf16, "StableDiffusionPipeline", CPU) is Dtype.bf16


@pytest.mark.parametrize("given", ["gpu", "cpu:x", "meta"])
def test_unknown_devices_are_refused(given: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        choose_device(given)
    assert str(raised.value) == MSG_DEVICE.format(given=given)


@pytest.mark.parametrize("given", ["cuda", "cuda:99", "mps"])
def test_devices_that_are_not_here_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="Use --device cpu"):
        choose_device(given)
    assert choose_device("auto") == CPU
