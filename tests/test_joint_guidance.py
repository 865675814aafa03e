"""Guidance that ends early in pipelines with joint attention, through their unchanged call: see `tiny_joint.py`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import OneCall, TwoCalls, played
from tests.tiny_joint import JOINT, Joint

STEPS = 3
GATE = 1

#: One pipeline for each way in which guidance arrives; the others are marked as heavy.
QUICK = ("StableDiffusion3Pipeline", "FluxKontextPipeline", "QwenImagePipeline", "ZImagePipeline", "Flux2Pipeline")


def run(pipe: Any, **call: Any) -> torch.Tensor:
    call = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    with torch.random.fork_rng():
        torch.manual_seed(1)  # some pipelines encode images with noise of their own
        result = pipe(generator=torch.Generator().manual_seed(0), **call)
    return result[0] if torch.is_tensor(result[0]) else torch.cat(list(result[0]))


def expected_of(case: Joint, pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """Run `pipe(**call)` without guidance from the gate on, by plain hooks."""
    denoiser = pipe.transformer
    reference: OneCall | TwoCalls
    if case.guidance == "batch":
        reference = OneCall(
            denoiser, GATE, halved=case.halved, kept=case.kept, listed=case.listed, other_dims=case.other_dims
        )
    else:
        reference = TwoCalls(denoiser, GATE, guided=lambda: True)
    with ExitStack() as stack:
        stack.enter_context(played(reference, denoiser, ()))
        return run(pipe, **call)


def optimized(pipe: Any, step: int = GATE) -> Any:
    return tgate_compile.optimize(pipe, tgate_compile.AdaptiveGuidance(step), backend="eager")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.heavy) for n in JOINT])
def test_guidance_ends(name: str) -> None:
    """With all steps guided the pipeline is the plain one to the bit; from the gate on, the prompt's half remains."""
    case = JOINT[name]
    pipe, call = case.build(), case.call(case.prompts)
    plain = run(pipe, **call)
    expected = plain if case.guidance == "none" else expected_of(case, pipe, call)
    optimized(pipe, STEPS)
    assert torch.equal(run(pipe, **call), plain)
    tgate_compile.restore(pipe)
    optimized(pipe)
    assert_same(run(pipe, **call), expected)
    if case.guidance == "none":
        assert tgate_compile.describe(pipe).strip == "f" * STEPS
        return
    assert_differ(expected, plain)
    assert tgate_compile.describe(pipe).strip == "Fff"
    if case.off is not None:
        unguided = run(pipe, **{**call, **case.off})
        assert torch.equal(unguided, run(tgate_compile.restore(pipe), **{**call, **case.off}))
