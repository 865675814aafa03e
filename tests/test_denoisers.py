"""Pipelines besides Stable Diffusion and PixArt, through their unchanged call: see `denoiser_cases.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_cases import CASES, DISTINCT, ONE_PROMPT, SIBLINGS, STEPS, Case, expected_of, run


@dataclass(frozen=True)
class Pair:
    """A plain and an optimized pipeline with the same weights.

    Attributes:
        before: the names of all attributes of the pipeline and its denoisers before `optimize` and the first run.
    """

    name: str
    case: Case
    plain: Any
    gated: Any
    before: dict[str, set[str]]


#: The same denoisers as in another case, with other inputs, or the same mechanisms.
VARIATIONS = (
    "AnimateDiffPipeline",
    "LattePipeline",
    "KolorsPipeline",
    "AnimateDiffSDXLPipeline",
    "WanImageToVideoPipeline",
    "SkyReelsV2Pipeline",
    "Cosmos2TextToImagePipeline",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.heavy) if name in VARIATIONS else name for name in CASES],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    if request.param == "KolorsPipeline":
        pytest.importorskip("sentencepiece", reason="diffusers imports Kolors' tokenizer with it")
    case = CASES[request.param]
    pipe = case.build()
    before = {name: set(vars(module)) for name, module in parts(case, pipe).items()}
    return Pair(request.param, case, case.build(), optimized(case, pipe), before)


def parts(case: Case, pipe: Any) -> dict[str, Any]:
    return {"pipeline": pipe, **{name: getattr(pipe, name) for name in case.denoisers}}


def optimized(case: Case, pipe: Any) -> Any:
    return tgate_compile.optimize(pipe, case.gate, backend="eager")


def test_sites_written_by_hand_are_those_of_the_model(pair: Pair) -> None:
    for name in pair.case.denoisers:
        modules = [path for path, _ in getattr(pair.plain, name).named_modules()]
        walked = [path for path in modules if path.endswith("attn2") and "motion_modules" not in path]
        assert sorted(walked) == sorted(pair.case.sites)


def test_gated(pair: Pair) -> None:
    call = pair.case.call(2)
    expected = expected_of(pair.case, pair.plain, call)
    first = run(pair.gated, **call)
    assert_same(first, expected)
    assert torch.equal(run(pair.gated, **call), first)
    assert_differ(expected, run(pair.plain, **call))


#: The pipelines in which one prompt's two rows come in different ways: alternating sizes, equal rows, the prompt first.
ONE_PROMPT_QUICK = ("AnimateDiffSDXLPipeline", "HunyuanDiTPipeline", "LuminaPipeline")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "pair",
    [
        name if name in ONE_PROMPT_QUICK else pytest.param(name, marks=pytest.mark.sweep)
        for name, case in CASES.items()
        if case.halved
    ],
    indirect=True,
)
def test_one_prompt(pair: Pair) -> None:
    """Two rows can easily be mistaken for a table's, or for two prompts."""
    call = pair.case.call(1)
    assert_same(run(pair.gated, **call), expected_of(pair.case, pair.plain, call))


def test_ungated(pair: Pair) -> None:
    call = pair.case.call(2)
    assert torch.equal(run(pair.gated, gate_step=1000, **call), run(pair.plain, **call))


def test_without_guidance_nothing_is_halved(pair: Pair) -> None:
    call = {**pair.case.call(2), pair.case.guidance: 1.0}
    plain = run(pair.plain, **call)
    expected = expected_of(pair.case, pair.plain, call, guided=False)
    assert_same(run(pair.gated, **call), expected)
    assert tgate_compile.describe(pair.gated).strip == pair.case.strip.replace("F", "f")
    assert torch.equal(run(pair.gated, gate_step=1000, **call), plain)
    (assert_same if pair.case.exact else assert_differ)(expected, plain)


def test_description(pair: Pair) -> None:
    run(pair.gated, **pair.case.call(2))
    description = tgate_compile.describe(pair.gated)
    assert description.pipeline == pair.name.split(",")[0]
    assert description.denoiser == type(getattr(pair.plain, pair.case.denoisers[0])).__name__
    assert description.strip == pair.case.strip
    prefixes = [f"{name}." if len(pair.case.denoisers) > 1 else "" for name in pair.case.denoisers]
    assert sorted(description.sites) == sorted(prefix + site for prefix in prefixes for site in pair.case.sites)


def test_description_beforehand(pair: Pair) -> None:
    """The description of a call before it runs matches the call."""
    call = pair.case.call(2)
    foreseen = tgate_compile.describe(pair.gated, num_inference_steps=STEPS, output_type="latent", **call)
    run(pair.gated, **call)
    done = tgate_compile.describe(pair.gated)
    assert (foreseen.strip, foreseen.cache_bytes, foreseen.sites) == (done.strip, done.cache_bytes, done.sites)


def test_restore(pair: Pair) -> None:
    call = pair.case.call(1)
    plain = run(pair.plain, **call)
    pipe = tgate_compile.restore(pair.gated)
    try:
        left = parts(pair.case, pipe)
        left_behind = {name: set(vars(part)) - pair.before[name] for name, part in left.items()}
        # diffusers itself sets attributes on a pipeline that runs.
        assert left_behind.pop("pipeline") <= set(vars(pair.plain))
        assert not any(left_behind.values())
        for name, untouched in parts(pair.case, pair.plain).items():
            assert type(left[name]) is type(untouched)
            assert left[name].__call__.__func__ is untouched.__call__.__func__
        assert torch.equal(run(pipe, **call), plain)
    finally:
        optimized(pair.case, pipe)


#: Attentions whose projections are not called `to_k` are not recognized: see `denies_cross_attention`.
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # two audio VAEs
@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.sweep) for name in SIBLINGS]
)
def test_sibling(name: str) -> None:
    """Check gated, ungated and the sites, which can differ although the denoiser is that of a pipeline above."""
    case = SIBLINGS[name]
    call = case.call(1 if name in ONE_PROMPT else 2)
    pipe = case.build()
    plain = run(pipe, **call)
    expected = expected_of(case, pipe, call, guided=case.guided)
    assert_differ(expected, plain)
    optimized(case, pipe)
    assert_same(run(pipe, **call), expected)
    description = tgate_compile.describe(pipe)
    assert (description.strip, sorted(description.sites)) == (case.strip, sorted(case.sites))
    assert torch.equal(run(pipe, gate_step=1000, **call), plain)
