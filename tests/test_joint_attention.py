"""Pipelines with joint attention, through their unchanged call: the text is frozen at the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.joint_denoisers import DENOISERS, DIM, TEXT, Tiny, random
from tests.joint_reference import FrozenText, frozen_text

STEPS = 6
GATE = 3


@dataclass(frozen=True)
class Case:
    """A pipeline.

    Attributes:
        build: makes it from its denoiser.
        call: returns the arguments of its call for a number of prompts.
        tiny: its denoiser.
        halved: see `FrozenText`.
        kept: see `FrozenText`.
        strip: the strip of a gated call.
        unguided: the arguments that switch guidance off.
    """

    build: Callable[[torch.nn.Module], Any]
    call: Callable[[int], dict[str, Any]]
    tiny: Tiny
    halved: tuple[str, ...] = ()
    kept: int = 1
    guided: bool = True
    strip: str = "FFFppp"
    unguided: tuple[tuple[str, Any], ...] = (("guidance_scale", 1.0),)


def text_of(batch: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.stack([random(*shape, seed=seed + row) for row in range(batch)])


def sd3(transformer: torch.nn.Module) -> Any:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(encoders))


def sd3_call(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "negative_prompt_embeds": text_of(batch, TEXT, DIM, seed=70),
        "pooled_prompt_embeds": text_of(batch, DIM, seed=80),
        "negative_pooled_prompt_embeds": text_of(batch, DIM, seed=90),
        "height": 64,
        "width": 64,
    }


def flux(transformer: torch.nn.Module) -> Any:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(encoders))


def flux_call(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "pooled_prompt_embeds": text_of(batch, DIM, seed=80),
        "height": 64,
        "width": 64,
    }


def qwen_image(transformer: torch.nn.Module) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return QwenImagePipeline(transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)


def qwen_image_call(batch: int) -> dict[str, Any]:
    mask, negative = torch.ones(2, batch, TEXT, dtype=torch.long)
    mask[0, 5:] = 0
    negative[:, 3:] = 0
    return {
        "prompt_embeds": text_of(batch, TEXT, DIM, seed=60),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": text_of(batch, TEXT, DIM, seed=70)[:, :4],
        "negative_prompt_embeds_mask": negative[:, :4],
        "height": 64,
        "width": 64,
    }


def flux2(transformer: torch.nn.Module) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return Flux2Pipeline(transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)


def flux2_call(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": text_of(batch, TEXT, DIM, seed=60), "height": 64, "width": 64}


CASES = {
    "StableDiffusion3Pipeline": Case(
        sd3,
        sd3_call,
        DENOISERS["sd3"],
        halved=("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
    ),
    "FluxPipeline": Case(flux, flux_call, DENOISERS["flux"], guided=False, strip="fffppp", unguided=()),
    "Flux2Pipeline": Case(flux2, flux2_call, DENOISERS["flux2"], guided=False, strip="fffppp", unguided=()),
    "QwenImagePipeline": Case(
        qwen_image, qwen_image_call, DENOISERS["qwen_image"], kept=0, unguided=(("true_cfg_scale", 1.0),)
    ),
}


def run(pipe: Any, **call: Any) -> torch.Tensor:
    """Return the final latents."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent").images  # type: ignore[no-any-return]


def expected_of(case: Case, call: dict[str, Any], gate: int = GATE, **options: Any) -> torch.Tensor:
    tiny = case.tiny
    pipe = case.build(tiny.build())
    given = {"guided": case.guided, "halved": case.halved, "kept": case.kept, **options}
    reference = FrozenText(pipe.transformer, gate, tiny.image + tiny.text, tiny.text_tokens, **given)
    with frozen_text(reference):
        return run(pipe, **call)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def gated(case: Case) -> Any:
    return tgate_compile.optimize(case.build(case.tiny.build()), GATE, backend="eager")


@pytest.fixture(scope="module")
def plain(case: Case) -> Any:
    return case.build(case.tiny.build())


def test_gated(case: Case, gated: Any, plain: Any) -> None:
    call = case.call(2)
    expected = expected_of(case, call)
    first = run(gated, **call)
    assert_same(first, expected)
    assert torch.equal(run(gated, **call), first)
    assert_differ(expected, run(plain, **call))
    assert tgate_compile.describe(gated).strip == case.strip


def test_ungated(case: Case, gated: Any, plain: Any) -> None:
    call = case.call(1)
    assert torch.equal(run(gated, gate_step=1000, **call), run(plain, **call))


def test_per_call_gate(case: Case, gated: Any) -> None:
    call = case.call(1)
    assert_same(run(gated, gate_step=1, **call), expected_of(case, call, 1))
