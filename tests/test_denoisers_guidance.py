"""Peculiarities in how some pipelines pass guidance to their denoiser: see `denoiser_cases.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tgate_compile
from tests import tiny_transformers, tiny_video
from tests.comparing import assert_differ, assert_same, difference
from tests.denoiser_cases import CASES, expected_of, run
from tests.tiny_pipelines import TEXT_DIM
from tests.tiny_transformers import embedded
from tgate_compile import CaptureError, ConfigurationError


def build(name: str) -> Any:
    if name == "KolorsPipeline":
        pytest.importorskip("sentencepiece", reason="diffusers imports Kolors' tokenizer with it")
    return CASES[name].build()


# Kolors: the sizes' rows alternate. Lumina: the prompt's half comes first.
@pytest.mark.parametrize("name", ["KolorsPipeline", "LuminaPipeline"])
def test_the_prompts_half_is_kept(name: str) -> None:
    case, pipe = CASES[name], build(name)
    call = case.call(2)
    expected = expected_of(case, pipe, call, kept=1 - case.kept)
    assert_differ(expected, expected_of(case, pipe, call))
    tgate_compile.optimize(pipe, case.gate, backend="eager", keep="cond")
    assert_same(run(pipe, **call), expected)


# Without caches the text of the remaining half still matters, so it must be the right half.
@pytest.mark.parametrize(
    "name", [pytest.param("AnimateDiffPipeline", marks=pytest.mark.heavy), "LuminaPipeline", "WanPipeline"]
)
def test_guidance_that_stops(name: str) -> None:
    case, pipe = CASES[name], build(name)
    call = case.call(2)
    expected = expected_of(case, pipe, call, kept=1 - case.kept, cached=False)
    assert_differ(expected, run(pipe, **call))
    tgate_compile.optimize(pipe, None, guidance_step=case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)


@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "WanPipeline"])
def test_the_other_half_cannot_be_kept(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cond"):
        tgate_compile.optimize(build(name), 3, backend="eager", keep="uncond")


# The position table has a row for each token, shared by the halves, and here as many rows as the batch.
@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("HunyuanDiTPipeline", tiny_transformers.hunyuan_dit, {"height": 32, "width": 32}),  # 2 x 2 patches
        (
            "StableAudioPipeline",
            lambda: tiny_transformers.stable_audio(sample_size=3),
            {"audio_end_in_s": 1.0},
        ),  # and one more
    ],
)
def test_positions_are_no_batch(name: str, make: Callable[[], Any], size: dict[str, Any]) -> None:
    case, pipe = CASES[name], make()
    call = {**case.call(2), **size}
    expected = expected_of(case, pipe, call)
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)


def test_stable_audio_without_a_negative_prompt() -> None:
    case, pipe = CASES["StableAudioPipeline"], build("StableAudioPipeline")
    call = tiny_transformers.stable_audio_call_without_negative_prompt(2)
    expected = expected_of(case, pipe, call)
    assert_differ(expected, expected_of(case, pipe, case.call(2)))
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)


def test_stable_video_diffusion_between_guidance_scales() -> None:
    """Its guidance scale grows from frame to frame, and guidance is on if it is on for any frame."""
    case, pipe = CASES["StableVideoDiffusionPipeline"], build("StableVideoDiffusionPipeline")
    call = {**case.call(1), "min_guidance_scale": 0.5, "max_guidance_scale": 1.5}
    expected = expected_of(case, pipe, call)
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip == "FFFppp"


def test_stable_video_diffusion_with_the_prompts_half_in_the_cache() -> None:
    """Its cross-attentions return the same in all steps: caching the cond half's own value loses nothing."""
    case, pipe = CASES["StableVideoDiffusionPipeline"], build("StableVideoDiffusionPipeline")
    call = case.call(1)
    only_without_guidance = expected_of(case, pipe, call, cached=False)
    assert_differ(only_without_guidance, expected_of(case, pipe, call))
    tgate_compile.optimize(pipe, case.gate, backend="eager", anchor_weight=1.0)
    assert_same(run(pipe, **call), only_without_guidance)


def test_guidance_rescale() -> None:
    case, pipe = CASES["HunyuanDiTPipeline"], build("HunyuanDiTPipeline")
    call = {**case.call(1), "guidance_rescale": 0.7}
    expected = expected_of(case, pipe, call)
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)


# Wan: two calls per timestep, and in 2.2 two transformers.


def pair(name: str, gate_step: Any) -> SimpleNamespace:
    """Return a plain and an optimized pipeline with the same weights."""
    gated = tgate_compile.optimize(build(name), gate_step, backend="eager")
    return SimpleNamespace(case=CASES[name], plain=build(name), gated=gated)


@pytest.fixture(scope="module")
def wan() -> SimpleNamespace:
    return pair("WanPipeline", CASES["WanPipeline"].gate)


@pytest.fixture(scope="module")
def wan_of_two() -> SimpleNamespace:
    return pair("WanPipeline, two transformers", (3, 1))


@pytest.mark.parametrize(
    ("gate_step", "gates", "strip"),
    [
        (None, (3, 1), "FFFp|Fp"),
        ((2, 5), (2, 5), "FFpp|FF"),
        ((9, 1), (9, 1), "FFFF|Fp"),
        (1, (1, 1), "Fppp|Fp"),
        (0.5, (2, 1), "FFpp|Fp"),
    ],
)
def test_each_of_two_transformers_has_its_own_gate(
    wan_of_two: SimpleNamespace, gate_step: Any, gates: tuple[int, int], strip: str
) -> None:
    call = wan_of_two.case.call(1)
    expected = expected_of(wan_of_two.case, wan_of_two.plain, call, gates=gates)
    assert_same(run(wan_of_two.gated, gate_step=gate_step, **call), expected)
    assert tgate_compile.describe(wan_of_two.gated).strip == strip


def test_two_transformers_ungated(wan_of_two: SimpleNamespace) -> None:
    call = wan_of_two.case.call(1)
    assert torch.equal(run(wan_of_two.gated, gate_step=(4, 2), **call), run(wan_of_two.plain, **call))


@pytest.mark.parametrize(("steps", "strip"), [(9, "FFFpppp|Fp"), (2, "F|F"), (1, "F")])
def test_two_transformers_with_another_number_of_steps(wan_of_two: SimpleNamespace, steps: int, strip: str) -> None:
    """The boundary between the transformers moves."""
    call = {**wan_of_two.case.call(1), "num_inference_steps": steps}
    assert_same(run(wan_of_two.gated, **call), expected_of(wan_of_two.case, wan_of_two.plain, call, gates=(3, 1)))
    assert tgate_compile.describe(wan_of_two.gated).strip.strip("|") == strip


@pytest.mark.parametrize("wrong", [(3, 1, 1), (3,), (0, 1), (3, 1.5)])
def test_wrong_gates_of_two_transformers(wan_of_two: SimpleNamespace, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="gate_step"):
        run(wan_of_two.gated, gate_step=wrong, **wan_of_two.case.call(1))


@pytest.mark.parametrize("ratio", [0.001, 1.1])
def test_a_transformer_that_no_timestep_reaches(ratio: float) -> None:
    case = dataclasses.replace(CASES["WanPipeline"], denoisers=("transformer", "transformer_2"))
    pipe, call = tiny_video.wan(boundary_ratio=ratio), case.call(1)
    expected = expected_of(case, pipe, call, gates=(1, 1))
    tgate_compile.optimize(pipe, 1, backend="eager")
    assert_same(run(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip.strip("|") == "Fppppp"


@pytest.mark.parametrize(("at", "strip"), [(0, "Fffppp"), (2, "FFFppp"), (4, "FFFppp")])
def test_guidance_switched_off_on_the_way(wan: SimpleNamespace, at: int, strip: str) -> None:
    """From then on there is one call per timestep, and only the prompt's values are cached."""

    def switch_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe._guidance_scale = 1.0
        return tensors

    call = {**wan.case.call(1), "callback_on_step_end": switch_off}
    expected = expected_of(wan.case, wan.plain, call)
    assert_same(run(wan.gated, **call), expected)
    assert tgate_compile.describe(wan.gated).strip == strip
    assert_same(run(wan.gated, **call), expected)


def test_a_timestep_for_each_token() -> None:
    case, pipe = CASES["WanPipeline"], tiny_video.wan(expand_timesteps=True)
    call = case.call(2)
    expected = expected_of(case, pipe, call)
    assert_differ(expected, run(pipe, **call))
    tgate_compile.optimize(pipe, case.gate, backend="eager")
    assert_same(run(pipe, **call), expected)


def test_an_interrupted_video_leaves_nothing_behind(wan: SimpleNamespace) -> None:
    call = wan.case.call(1)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return tensors

    run(wan.gated, callback_on_step_end=interrupt, **call)
    assert tgate_compile.describe(wan.gated).strip == "FFFp"
    assert_same(run(wan.gated, **call), expected_of(wan.case, wan.plain, call))


def test_a_failure_between_the_two_calls_of_a_timestep_leaves_nothing_behind(wan: SimpleNamespace) -> None:
    call = wan.case.call(1)
    wrong = embedded(1, tiny_transformers.TOKENS, TEXT_DIM + 1, seed=1)
    with pytest.raises(CaptureError):
        run(wan.gated, **{**call, "negative_prompt_embeds": wrong})
    assert_same(run(wan.gated, **call), expected_of(wan.case, wan.plain, call))


def test_two_calls_with_texts_of_different_lengths(wan: SimpleNamespace) -> None:
    call = {**wan.case.call(1), "negative_prompt_embeds": embedded(1, tiny_transformers.TOKENS - 2, TEXT_DIM, seed=1)}
    assert_same(run(wan.gated, **call), expected_of(wan.case, wan.plain, call))


@pytest.mark.heavy
def test_two_calls_compiled() -> None:
    case, pipe = dataclasses.replace(CASES["WanPipeline"], sites=("blocks.0.attn2",)), tiny_video.wan(num_layers=1)
    call = case.call(1)
    expected = expected_of(case, pipe, call)
    tgate_compile.optimize(pipe, case.gate, backend="inductor")
    # Compiled kernels add in a different order, and six steps amplify the difference.
    assert difference(run(pipe, **call), expected) < 1e-4
