"""Models whose text tokens are the same in all steps: they are computed once, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.joint_reference import TextReference, frozen_text
from tests.test_joint_guidance import STEPS, run
from tests.tiny_denoisers import first_call
from tests.tiny_joint import JOINT
from tests.tiny_transformers import TOKENS
from tgate_compile import AdaptiveGuidance, FrozenText
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.compiled import inputs_for, tensors_of
from tgate_compile.engine.config import Config
from tgate_compile.engine.tracing import call_of
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import NONE, Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.binding_times import split_by_binding
from tgate_compile.passes.graphs import Captured
from tgate_compile.passes.specialize import specialize
from tgate_compile.pipeline.optimized import required_state_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


def captured_of(
    name: str, change: Callable[[dict[str, Any]], None] = lambda kwargs: None
) -> tuple[Any, Call, Captured]:
    denoiser, args, kwargs = first_call(name)
    kwargs = {**kwargs, "return_dict": False}
    change(kwargs)
    assert not args
    call = call_of(denoiser, (), kwargs, kwargs)
    return denoiser, call, capture(denoiser, denoiser.forward, call, NONE, required=False)


def open_mask(kwargs: dict[str, Any]) -> None:
    """Let every token of OmniGen see every other."""
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])


@pytest.mark.parametrize(
    ("name", "attentions"),
    [("QwenImage21Transformer2DModel", 4), ("OmniGenTransformer2DModel", 3), ("PRXTransformer2DModel", 2)],
)
@torch.no_grad()
def test_text_is_not_part_of_the_step(name: str, attentions: int) -> None:
    denoiser, call, captured = captured_of(name)
    assert captured.constant
    variant = specialize(captured, Phase(False))
    split = split_by_binding(variant, captured.roles)
    assert split.prelude is not None
    # Two are of the image. PRX has none of the text; in OmniGen the last one is not needed.
    by_part = [len(list(attention_cores(part.program.graph))) for part in (variant, split.prelude, split.step)]
    assert by_part == [attentions, attentions - 2, 2]
    weights = tensors_of(variant.program, live_tensors(denoiser))
    (output,) = variant.program.graph_module(*weights, *inputs_for(variant, captured, call, {}))
    assert_same(output, denoiser(**call.arguments[1])[0])


def test_a_mask_that_shows_the_image_to_the_text() -> None:
    assert not captured_of("OmniGenTransformer2DModel", open_mask)[2].constant


def test_other_models_have_no_constant_text() -> None:
    assert not captured_of("FluxTransformer2DModel")[2].constant


def test_computed_once_on_every_backend() -> None:
    config = Config(Schedule(10))
    assert config.splits("eager")
    assert not config.splits("inductor")
    assert config.splits("inductor", constant_text=True)
    assert not Config(Schedule(10), binding_times=False).splits("inductor", constant_text=True)


@pytest.mark.heavy
def test_qwen_image_2_1_without_its_cache() -> None:
    """The text is computed once for each half, and the latents differ from the plain pipeline's by rounding only."""
    case = JOINT["QwenImage21Pipeline"]
    pipe, call = case.build(), {**case.call(1), "use_kv_cache": False}
    for name in ("embeds", "embeds_mask"):  # both texts have as many tokens, so that one graph serves them
        call[f"negative_prompt_{name}"] = call[f"prompt_{name}"].flip(1)
    plain = run(pipe, **call)
    tgate_compile.optimize(pipe, AdaptiveGuidance(STEPS), backend="eager")
    assert_same(run(pipe, **call), plain)
    last = required_state_of(pipe).hook.last
    assert last is not None
    assert last.early.runs["prelude"] == 2
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, FrozenText(1), backend="eager")
    assert_same(run(pipe, **call), plain)
    assert tgate_compile.describe(pipe).strip == "FPP"


@pytest.mark.heavy
def test_qwen_image_2_1_with_its_cache() -> None:
    """The pipeline computes its prefix once by itself, in its first step, which runs as it is."""
    case = JOINT["QwenImage21Pipeline"]
    pipe, call = case.build(), case.call(1)
    plain = run(pipe, **call)
    tgate_compile.optimize(pipe, AdaptiveGuidance(STEPS), backend="eager")
    assert torch.equal(run(pipe, **call), plain)


@pytest.mark.heavy
def test_references_of_klein_kv() -> None:
    """The pipeline computes its references once by itself, and the text can be frozen after its first step."""
    case = JOINT["Flux2KleinKVPipeline"]
    pipe, call = case.build(), {**case.call(1), "num_inference_steps": 4}
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "attn" in name and parameter.ndim > 1:
                parameter.mul_(3)  # so that the text has a visible effect
    plain = run(pipe, **call)
    reference = TextReference(pipe.transformer, 2, TOKENS + 32, slice(0, TOKENS), guided=False)
    with frozen_text(reference):
        expected = run(pipe, **call)
    assert_differ(expected, plain)
    tgate_compile.optimize(pipe, FrozenText(2), backend="eager")
    assert_same(run(pipe, **call), expected)
    assert tgate_compile.describe(pipe).strip == "ffpp"
