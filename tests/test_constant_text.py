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
from tests.test_static_methods import skipping
from tests.tiny_denoisers import first_call
from tests.tiny_joint import JOINT
from tests.tiny_transformers import TOKENS
from tgate_compile import (
    AdaptiveGuidance,
    BlockCache,
    CaptureError,
    FirstBlockCache,
    FrozenText,
    Method,
    TGate,
)
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.compiled import CachedValues, inputs_for, tensors_of
from tgate_compile.engine.config import Config
from tgate_compile.engine.tracing import call_of
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import BLOCKS, CROSS, NONE, Blocks, Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.binding_times import split_by_binding
from tgate_compile.passes.graphs import Captured, Variant
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


def outputs_of(
    denoiser: Any, captured: Captured, variant: Variant, call: Call, caches: CachedValues
) -> tuple[torch.Tensor, ...]:
    """Run `variant`, and return the prediction and the emitted values."""
    weights = tensors_of(variant.program, live_tensors(denoiser))
    outputs: tuple[torch.Tensor, ...] = variant.program.graph_module(
        *weights, *inputs_for(variant, captured, call, caches)
    )
    return outputs


def open_mask(kwargs: dict[str, Any]) -> None:
    """Let every token of OmniGen see every other."""
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])


@pytest.mark.parametrize(
    ("name", "attentions"),
    [
        pytest.param("QwenImage21Transformer2DModel", 4, marks=pytest.mark.sweep),
        ("OmniGenTransformer2DModel", 3),
        pytest.param("PRXTransformer2DModel", 2, marks=pytest.mark.sweep),
    ],
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
    (output,) = outputs_of(denoiser, captured, variant, call, {})
    assert_same(output, denoiser(**call.arguments[1])[0])


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("OmniGenTransformer2DModel", "layers"),
        pytest.param("PRXTransformer2DModel", "blocks", marks=pytest.mark.sweep),
        pytest.param("QwenImage21Transformer2DModel", "transformer_blocks", marks=pytest.mark.sweep),
    ],
)
@torch.no_grad()
def test_blocks_are_skipped_beside_it(name: str, stack: str) -> None:
    """The residual is that of the image alone, whether or not the text's keys and values are cached as well."""
    denoiser, args, kwargs = first_call(name)
    assert not args
    kwargs = {**kwargs, "return_dict": False}
    later = {**kwargs, "hidden_states": kwargs["hidden_states"].flip(-1) * 3}
    with skipping(denoiser, f"{stack}.0", f"{stack}.1", [True, False]):
        first, second = (denoiser(**each)[0] for each in (kwargs, later))
    assert_differ(second, denoiser(**later)[0])
    calls = [call_of(denoiser, (), each, each) for each in (kwargs, later)]
    for kinds in (BLOCKS, BLOCKS | CROSS):
        captured = capture(denoiser, denoiser.forward, calls[0], kinds, ranges=(("blocks", Blocks()),))
        assert captured.constant
        full = specialize(captured, Phase(False, emit=kinds))
        output, *values = outputs_of(denoiser, captured, full, calls[0], {})
        assert_same(output, first)
        caches = {(e.site.kind, e.site.name): value for e, value in zip(full.emitted, values, strict=True)}
        for reuse in {BLOCKS, kinds}:
            skipped = specialize(captured, Phase(False, emit=kinds - reuse, reuse=reuse))
            assert_same(outputs_of(denoiser, captured, skipped, calls[1], caches)[0], second)


def test_a_mask_that_shows_the_image_to_the_text() -> None:
    assert not captured_of("OmniGenTransformer2DModel", open_mask)[2].constant


def test_other_models_have_no_constant_text() -> None:
    assert not captured_of("FluxTransformer2DModel")[2].constant


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@torch.no_grad()
def test_the_denoiser_itself_runs_after_a_capture() -> None:
    """Nucleus-Image keeps its tables of positions from call to call, but must not keep those of a trace."""
    denoiser, call, captured = captured_of("NucleusMoEImageTransformer2DModel")
    (expected,) = outputs_of(denoiser, captured, specialize(captured, Phase(False)), call, {})
    assert_same(denoiser(**call.arguments[1])[0], expected)


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

    def images(method: Method) -> tuple[torch.Tensor, str]:
        tgate_compile.optimize(pipe, method, backend="eager")
        try:
            return run(pipe, **call), tgate_compile.describe(pipe).strip
        finally:
            tgate_compile.restore(pipe)

    assert torch.equal(images(AdaptiveGuidance(STEPS))[0], plain)
    frozen, strip = images(FrozenText(2))
    assert torch.equal(frozen, plain)
    assert strip == "FFP"
    skipped, strip = images(BlockCache(2, warm_up=2))
    assert_differ(skipped, plain)
    assert strip == "FFK"
    without_guidance, _ = images(AdaptiveGuidance(2))
    assert_differ(without_guidance, plain)
    assert_same(images(TGate(2))[0], without_guidance)
    for method in (FrozenText(1), FirstBlockCache(0.1)):
        with pytest.raises(CaptureError, match="fills a cache of keys and values in this step"):
            images(method)


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
