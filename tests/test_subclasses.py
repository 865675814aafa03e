"""Subclasses of diffusers' pipelines inherit the facts of their base; a class with merely the same name does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_cases import CASES, SIBLINGS, Case, expected_of, run
from tests.tiny_pipelines import sdxl
from tests.tiny_siblings import SIZES, prompts
from tgate_compile.engine.families import FAMILIES, Family, family_of, has_joint_attention, refusal

SDXL = Case(
    sdxl,
    lambda batch: {**prompts(batch), **SIZES},
    SIBLINGS["StableDiffusionXLControlNetPipeline"].sites,
    halved=("sample", "encoder_hidden_states", "added_cond_kwargs"),
    alternating=("time_ids",),
    denoisers=("unet",),
)


def subclassed(pipe: Any) -> Any:
    """Make `pipe` an instance of a user's subclass of its class."""
    pipe.__class__ = type("Mine", (type(pipe),), {"__module__": "mine"})
    return pipe


# Alternating sizes, text per frame (and residuals), the prompt first, positions, two calls.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SDXL, id="StableDiffusionXLPipeline"),
        *(
            pytest.param({**CASES, **SIBLINGS}[name], id=name)
            for name in ("AnimateDiffPipeline", "AnimateDiffControlNetPipeline", "LuminaPipeline", "WanPipeline")
        ),
    ],
)
def test_a_subclass_is_gated_like_its_base(case: Case) -> None:
    pipe = subclassed(case.build())
    call = case.call(1 if "ControlNet" in type(pipe).__mro__[1].__name__ else 2)
    plain = run(pipe, **call)
    expected = expected_of(case, pipe, call)
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    gated = run(pipe, **call)
    assert_same(gated, expected)
    assert_differ(gated, plain)
    assert tgate_compile.describe(pipe).pipeline == "Mine"


def test_the_nearest_base_that_has_a_row_counts() -> None:
    class Mine(diffusers.AnimateDiffControlNetPipeline):
        pass

    class Further(Mine):
        pass

    assert family_of(Further) is FAMILIES["AnimateDiffControlNetPipeline"]


def test_the_class_that_optimize_makes_has_the_facts_of_the_pipeline() -> None:
    pipe = tgate_compile.optimize(CASES["WanPipeline"].build(), 3, backend="eager")
    assert family_of(type(pipe)) is FAMILIES["WanPipeline"]


def of_the_same_name(name: str, base: type = DiffusionPipeline) -> type:
    return type(name, (base,), {"__module__": "diffusers_modules.local.mine"})


@pytest.mark.parametrize("name", ["WanPipeline", "StableDiffusionXLPipeline", "AnimateDiffPipeline"])
def test_another_class_of_the_same_name_is_unknown(name: str) -> None:
    assert family_of(of_the_same_name(name)) == Family()


def test_another_class_of_the_same_name_as_a_refused_one_is_unknown() -> None:
    assert refusal(of_the_same_name("StableDiffusionSAGPipeline")) is None
    assert refusal(diffusers.StableDiffusionSAGPipeline) is not None


@pytest.mark.parametrize(
    ("model", "joint"),
    [
        (lambda: diffusers.FluxTransformer2DModel, True),
        (lambda: type("Mine", (diffusers.FluxTransformer2DModel,), {"__module__": "mine"}), True),
        (lambda: type("FluxTransformer2DModel", (diffusers.ModelMixin,), {"__module__": "mine"}), False),
        (lambda: diffusers.UNet2DConditionModel, False),
    ],
)
def test_denoisers_with_joint_attention_and_their_subclasses(model: Callable[[], type], joint: bool) -> None:
    assert has_joint_attention(model()) is joint


def test_a_denoiser_that_cannot_be_cached_has_guidance_to_drop() -> None:
    pipeline, denoiser = of_the_same_name("Mine"), diffusers.LTX2VideoTransformer3DModel
    reason = refusal(pipeline, denoiser)
    assert reason is not None
    assert "sound and video" in reason
    assert refusal(pipeline, denoiser, caches_cross=False) is None


def test_a_refused_denoiser_is_refused_in_every_pipeline() -> None:
    denoiser = type("Mine", (diffusers.HeliosTransformer3DModel,), {"__module__": "mine"})
    reason = refusal(of_the_same_name("Mine"), denoiser)
    assert reason is not None
    assert "in pieces" in reason
    assert refusal(of_the_same_name("Mine"), diffusers.WanTransformer3DModel) is None
