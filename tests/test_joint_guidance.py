"""Guidance that ends early in pipelines with joint attention, through their unchanged call: see `tiny_joint.py`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import ROUNDING, assert_differ, assert_same, difference
from tests.denoiser_reference import OneCall, TwoCalls, played
from tests.tiny_joint import Joint
from tests.tiny_joint_siblings import EVERY as JOINT

# diffusers uses some of its deprecated names; Mochi and Nucleus warn of their own behaviour.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning"),
]

STEPS = 3
GATE = 1

#: One pipeline for each way in which guidance arrives, and some denoisers that no other test runs. All others are in
#: the sweep.
QUICK = (
    "StableDiffusion3Pipeline", "FluxKontextPipeline", "QwenImagePipeline", "ZImagePipeline", "Flux2Pipeline",
    "BriaFiboPipeline", "LongCatImagePipeline", "OmniGenPipeline",
)  # fmt: skip


#: Further mechanisms: further predictions, a guider, ControlNets, lists of rows, videos, text in another dimension,
#: several loops over timesteps.
HEAVY = (
    "StableDiffusion3ControlNetPipeline", "FluxControlNetPipeline", "ChromaPipeline", "Lumina2Pipeline",
    "QwenImageEditPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline", "MochiPipeline", "LTX2Pipeline",
    "HiDreamImagePipeline", "GlmImagePipeline", "ZImageControlNetPipeline", "HunyuanVideoImageToVideoPipeline",
    "EasyAnimateInpaintPipeline", "LTX2ImageToVideoPipeline", "LTX2DFRTemporalRefinePipeline", "VisualClozePipeline",
    "StableDiffusion3InpaintPipeline", "PRXPixelPipeline", "CogVideoXFunControlPipeline", "LTX2DFRPipeline",
    "MotifVideoImage2VideoPipeline", "VisualClozeGenerationPipeline", "HunyuanVideo15ImageToVideoPipeline",
    "BriaFiboEditPipeline", "LongCatImageEditPipeline", "ConsisIDPipeline", "Cosmos3OmniPipeline",
    "JoyImageEditPlusPipeline",
)  # fmt: skip


def _mark(name: str) -> pytest.MarkDecorator:
    return pytest.mark.heavy if name in HEAVY else pytest.mark.sweep


def run(pipe: Any, **call: Any) -> torch.Tensor:
    steps = {} if "sigmas" in call else {"num_inference_steps": STEPS}
    call = {**steps, "output_type": "latent", **call}
    with torch.random.fork_rng():
        torch.manual_seed(1)  # some pipelines encode images with noise of their own
        if call["output_type"] != "latent":  # a pipeline that cannot return its latents
            return _last_latents(pipe, generator=torch.Generator().manual_seed(0), **call)
        result = pipe(generator=torch.Generator().manual_seed(0), **call)
    return result[0] if torch.is_tensor(result[0]) else torch.cat(list(result[0]))


def _last_latents(pipe: Any, **call: Any) -> torch.Tensor:
    steps: list[torch.Tensor] = []
    pipe(**call, callback_on_step_end=lambda pipe, step, time, tensors: steps.append(tensors["latents"]) or {})
    return steps[-1]


def expected_of(case: Joint, pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """Run `pipe(**call)` without guidance from the gate on, by plain hooks."""
    denoiser = pipe.transformer
    reference: OneCall | TwoCalls
    if case.guidance == "batch":
        reference = OneCall(
            denoiser,
            GATE,
            halved=case.halved,
            kept=case.kept,
            further=case.further,
            listed=case.listed,
            other_dims=case.other_dims,
        )
    else:
        reference = TwoCalls(denoiser, GATE, guided=lambda: True)
    with ExitStack() as stack:
        stack.enter_context(played(reference, denoiser, ()))
        return run(pipe, **call)


def optimized(pipe: Any, step: int = GATE) -> Any:
    return tgate_compile.optimize(pipe, tgate_compile.AdaptiveGuidance(step), backend="eager")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=_mark(n)) for n in JOINT])
def test_guidance_ends(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """With all steps guided the pipeline is the plain one to the bit; from the gate on, the prompt's half remains."""
    case = JOINT[name]
    if case.needs:
        pytest.importorskip(case.needs)
    pipe, call = case.build(), case.call(case.prompts)
    plain = run(pipe, **call)
    expected = plain if case.guidance == "none" else expected_of(case, pipe, call)
    optimized(pipe, STEPS)
    ungated = run(pipe, **call)
    assert torch.equal(ungated, plain) if case.exact else difference(ungated, plain) < ROUNDING
    tgate_compile.restore(pipe)
    optimized(pipe)
    assert_same(run(pipe, **call), expected)
    assert ("runs uncompiled" in caplog.text) == (name == "HiDreamImagePipeline")
    if case.guidance == "none":
        assert set(tgate_compile.describe(pipe).strip) == {"f"}
        return
    assert_differ(expected, plain)
    assert tgate_compile.describe(pipe).strip == "Fff"
    if case.off is not None:
        unguided = run(pipe, **{**call, **case.off})
        assert torch.equal(unguided, run(tgate_compile.restore(pipe), **{**call, **case.off}))


@pytest.mark.parametrize("name", ["QwenImagePipeline", pytest.param("ZImagePipeline", marks=pytest.mark.heavy)])
def test_several_images_for_each_prompt(name: str) -> None:
    case = JOINT[name]
    pipe, call = case.build(), {**case.call(1), "num_images_per_prompt": 2}
    expected = expected_of(case, pipe, call)
    assert_same(run(optimized(pipe), **call), expected)


def test_layers_that_guidance_skips() -> None:
    """Skip-layer guidance makes a further prediction in each step, and ends with the rest of guidance."""
    case = JOINT["StableDiffusion3Pipeline"]
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 1.0}
    pipe, call = case.build(), {**case.call(1), **skipping}
    plain = run(pipe, **call)
    assert_differ(plain, run(pipe, **case.call(1)))
    expected = expected_of(dataclasses.replace(case, further=True), pipe, call)
    assert_differ(expected, plain)
    assert_same(run(optimized(pipe), **call), expected)


def test_guidance_that_the_pipeline_itself_ends() -> None:
    """Lumina 2 has no second call once a fraction of the steps is over."""
    pipe, call = JOINT["Lumina2Pipeline"].build(), JOINT["Lumina2Pipeline"].call(1)
    call["cfg_trunc_ratio"] = 0.5
    plain = run(pipe, **call)
    assert torch.equal(run(optimized(pipe, STEPS), **call), plain)
    assert tgate_compile.describe(pipe).strip == "Fff"


def test_a_call_without_guidance_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = JOINT["Flux2Pipeline"].build(), JOINT["Flux2Pipeline"].call(1)
    optimized(pipe)
    for _ in range(2):
        run(pipe, **call)
    messages = [record.message for record in caplog.records if "no guidance to drop" in record.message]
    assert len(messages) == 1
    assert "takes the guidance scale as an input" in messages[0]


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxKontextPipeline"])
def test_guidance_ends_by_likeness(name: str) -> None:
    """Only the predictions for the image are compared, without the tokens of a reference image."""
    case = JOINT[name]
    pipe, call = case.build(), case.call(1)
    likeness: list[float] = []
    halves: list[torch.Tensor] = []
    forward = pipe.transformer.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        halves.extend(result[0].chunk(2) if case.guidance == "batch" else [result[0]])
        if len(halves) == 2:
            first, second = (half[:, :16].flatten() for half in halves)
            likeness.append(float(torch.cosine_similarity(first, second, dim=0)))
            halves.clear()
        return result

    pipe.transformer.forward = watch
    run(pipe, **call)
    del pipe.transformer.forward
    assert len(likeness) == STEPS
    order = sorted(likeness)
    # Guidance ends after the first step at which the threshold is reached.
    threshold = (order[0] + order[-1]) / 2
    guided = next(step for step, value in enumerate(likeness) if value >= threshold) + 1
    tgate_compile.optimize(pipe, tgate_compile.AdaptiveGuidance(similarity=threshold), backend="eager")
    run(pipe, **call)
    assert tgate_compile.describe(pipe).strip == "F" * guided + "f" * (STEPS - guided)


def test_a_table_that_the_first_call_computes() -> None:
    """A plain object in this denoiser keeps the rotary embeddings of its first call, which is a trace here."""
    case = JOINT["BriaFibo2Pipeline"]
    call = case.call(1)
    plain = run(case.build(), **call)
    pipe = optimized(case.build(), STEPS)
    assert torch.equal(run(pipe, **call), plain)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe, **call), plain)
