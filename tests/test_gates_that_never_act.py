"""A gate without a step to act on causes a warning, once per pipeline, with a number that would act."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgate_compile
from tests.own_loops import NO_TEXT, TEXTS
from tests.tiny_pipelines import image, run, stable_diffusion
from tests.tiny_video import wan, wan_call


def optimized(name: str = "StableDiffusionPipeline", **options: Any) -> Any:
    return tgate_compile.optimize(stable_diffusion(name, layout="small"), backend="eager", **options)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_fewer_steps_than_the_default_gate(warned: Callable[[], list[str]]) -> None:
    pipe, other = optimized(), optimized()
    for _ in range(2):
        run(pipe, steps=5)
    (message,) = warned()
    assert message == (
        "The gate had no effect in this call of StableDiffusionPipeline: it ran 5 steps, and gate_step is 10. "
        "Use a gate_step of at most 4, or a fraction such as gate_step=0.4, which adapts to the number of steps."
    )
    # The suggested number works.
    run(pipe, steps=5, gate_step=4)
    assert tgate_compile.describe(pipe).strip == "FFFFp"
    run(other, steps=5)
    assert len(warned()) == 2


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("StableDiffusionPipeline", {"steps": 3}, "it ran 3 steps, and gate_step is 3. Use a gate_step of at most 2"),
        ("StableDiffusionPipeline", {"steps": 1}, "it ran 1 steps, and gate_step is 3. With a single step, there is"),
        (
            "StableDiffusionImg2ImgPipeline",
            {"steps": 10, "image": image(), "strength": 0.2},
            "StableDiffusionImg2ImgPipeline: it ran 2 steps, and gate_step is 3. Use a gate_step of at most 1, or",
        ),
    ],
)
def test_the_number_that_would_act(
    name: str, call: dict[str, Any], expected: str, warned: Callable[[], list[str]]
) -> None:
    run(optimized(name, gate_step=3), **call)
    (message,) = warned()
    assert expected in message


def test_halves_in_two_calls(warned: Callable[[], list[str]]) -> None:
    pipe = tgate_compile.optimize(wan(), backend="eager")
    pipe(**wan_call(), num_inference_steps=2, output_type="latent")
    (message,) = warned()
    assert "it ran 2 steps, and gate_step is 10. Use a gate_step of at most 1, or" in message


def test_a_loop_without_generation(warned: Callable[[], list[str]]) -> None:
    pipe = optimized(gate_step=2)

    @torch.no_grad()
    def loop() -> None:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            texts = torch.cat([NO_TEXT, TEXTS[:1]])
            prediction = pipe.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=texts).sample
            latents = pipe.scheduler.step(prediction.chunk(2)[1], timestep, latents).prev_sample

    with tgate_compile.generation(pipe, guidance=True):
        loop()
    assert warned() == []
    for _ in range(2):
        loop()
    (message,) = warned()
    assert "UNet2DConditionModel has been called outside of its pipeline's call" in message
    assert "tgate_compile.generation(pipe, guidance=...)" in message


def interrupted(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
    pipe._interrupt = True
    return tensors


def test_no_warning_without_need(warned: Callable[[], list[str]]) -> None:
    pipe = optimized(gate_step=2)
    run(pipe, steps=3)
    run(pipe, steps=3, guidance_scale=1.0)
    run(pipe, steps=4, callback_on_step_end=interrupted)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, None, guidance_step=5, backend="eager")
    run(pipe, steps=3)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, 5, sp_interval=2, warm_up=0, backend="eager")
    run(pipe, steps=4)  # self-attention is reused before the gate
    assert tgate_compile.describe(pipe).strip != "FFFF"
    assert warned() == []


def test_a_call_that_runs_plain_logs_only_that(warned: Callable[[], list[str]]) -> None:
    pipe = stable_diffusion(layout="small")
    seen: list[Any] = []
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(None))
    tgate_compile.optimize(pipe, backend="eager", on_unsupported="plain")
    run(pipe, steps=3)
    (message,) = warned()
    assert "runs in full, since it cannot be gated" in message
