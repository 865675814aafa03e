"""FORA, PAB, TaylorSeer and MagCache against diffusers' hooks, on tiny pipelines of the classes that they serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_mag_cache, apply_pyramid_attention_broadcast, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.taylorseer_cache import TaylorSeerState

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.test_faster_cache import STEPS, latents_of, pixart_call
from tests.test_static_methods import RATIOS, mask_of_taylorseer
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import pixart
from tests.tiny_video import ltx, ltx_call
from tgate_compile import PAB, AdaptiveGuidance, Fora, MagCache, Method, Schedule, TGate


@dataclass(frozen=True)
class Case:
    """A pipeline.

    Attributes:
        build: makes the pipeline.
        call: returns the arguments of its call.
        modules: the names of attentions and feed-forward modules, as a regular expression.
        attention: the names of the attentions alone.
    """

    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    modules: str
    attention: str


def joint(name: str, modules: str, attention: str = r"transformer_blocks\.\d+\.attn") -> Case:
    return Case(JOINT[name].build, lambda: JOINT[name].call(1), modules, attention)


CASES = {
    "qwen_image": joint("QwenImagePipeline", r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)"),
    "cogvideox": joint("CogVideoXPipeline", r"transformer_blocks\.\d+\.(attn1|ff)"),
    "hunyuan_video": joint(
        "HunyuanVideoPipeline", r"^(transformer_blocks|single_transformer_blocks)\.\d+\.(attn|ff|ff_context)"
    ),
    "ltx": Case(ltx, ltx_call, r"transformer_blocks\.\d+\.(attn1|attn2|ff)", r"transformer_blocks\.\d+\.attn"),
}
SWEEP = pytest.mark.sweep
WIDE = [pytest.param(name, marks=SWEEP) for name in CASES]


@pytest.mark.parametrize("order", [0, pytest.param(1, marks=SWEEP)])
@pytest.mark.parametrize("name", WIDE)
def test_fora_and_taylorseer(name: str, order: int) -> None:
    """The class of the modules decides what diffusers caches, and `Fora` finds the same ones in the graph."""
    case, mask = CASES[name], mask_of_taylorseer(3, 3)
    ours, theirs = case.build(), case.build()
    plain = latents_of(ours, case.call())
    tgate_compile.optimize(ours, Fora(mask=mask, forecast=order), backend="eager")
    images = latents_of(ours, case.call())
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=3, max_order=order, taylor_factors_dtype=torch.float32,
        cache_identifiers=[case.modules],
    )  # fmt: skip
    apply_taylorseer_cache(theirs.transformer, config)
    _set_cache_context(theirs.transformer, CacheContext("inference"))  # which not every pipeline does
    assert_same(images, latents_of(theirs, case.call()))
    assert_differ(images, plain)


@pytest.mark.parametrize("name", WIDE)
def test_mag_cache(name: str) -> None:
    case = CASES[name]
    ours, theirs = case.build(), case.build()
    plain = latents_of(ours, case.call())
    tgate_compile.optimize(ours, MagCache(RATIOS, retention=0.25), backend="eager")
    images = latents_of(ours, case.call())
    config = MagCacheConfig(retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=torch.tensor(RATIOS))
    apply_mag_cache(theirs.transformer, config)
    assert_same(images, latents_of(theirs, case.call()))
    assert_differ(images, plain)


@SWEEP
def test_pab_in_a_video_model() -> None:
    """diffusers' hook counts steps itself, so every step is within its window here, and in ours."""
    case, method = CASES["ltx"], PAB(4, 2, begin=0.0, end=1.0)
    ours, theirs = case.build(), case.build()
    plain = latents_of(ours, case.call())
    tgate_compile.optimize(ours, method, backend="eager")
    images = latents_of(ours, case.call())
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=4,
        spatial_attention_timestep_skip_range=(-1, 1001),
        cross_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(r"transformer_blocks\.\d+\.attn1",),
        cross_attention_block_identifiers=(r"transformer_blocks\.\d+\.attn2",),
        current_timestep_callback=lambda: 500,
    )
    # diffusers tells the kind of an attention by `is_cross_attention`, which LTX's attentions lack.
    for name, module in theirs.transformer.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.is_cross_attention = name.endswith("attn2")
    apply_pyramid_attention_broadcast(theirs.transformer, config)
    assert_same(images, latents_of(theirs, case.call()))
    assert_differ(images, plain)


def test_a_gate_ends_forecasts() -> None:
    """What a gate freezes is reused as it is, and what is computed after it is not forecast from values before it.

    Without guidance, the shapes of cached values do not change at a gate, so they do not show this.
    """
    strip = "fhhffphh"
    states: dict[str, TaylorSeerState] = {}
    frozen: dict[str, torch.Tensor] = {}
    step = -1

    def count(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1
        if step == 5:
            states.clear()

    def reuse(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            is_cross = name.endswith("attn2")
            if is_cross and step >= 5:
                return frozen[name]
            state = states.setdefault(name, TaylorSeerState(torch.float32, 1))
            state.current_step = step
            if strip[step] == "h":
                return state.predict()[0]
            state.update((output,))
            frozen[name] = output
            return output

        return hook

    ours, theirs, call = pixart(), pixart(), {**pixart_call(), "guidance_scale": 1.0}
    theirs.transformer.register_forward_pre_hook(count, with_kwargs=True)
    for name, module in theirs.transformer.named_modules():
        if name.split(".")[-1] in ("attn1", "attn2", "ff"):
            module.register_forward_hook(reuse(name))
    schedule = Fora(3, forecast=1) + TGate(5)
    tgate_compile.optimize(ours, schedule, backend="eager")
    foreseen = tgate_compile.describe(ours, **call, num_inference_steps=STEPS, output_type="latent")
    images = latents_of(ours, call)
    assert_same(images, latents_of(theirs, call))
    described = tgate_compile.describe(ours)
    assert (described.strip, described.cache_bytes) == (strip, foreseen.cache_bytes)
    assert all(not weights for weights in schedule.forecast_weights(STEPS, guided=False)[5:])


# FORA in joint attention, together with the end of guidance.


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("StableDiffusion3Pipeline", Fora(2)),
        pytest.param("QwenImagePipeline", Fora(3), marks=SWEEP),
    ],
    ids=str,
)
def test_fora_where_guidance_ends_in_joint_attention(name: str, method: Method) -> None:
    """With the halves in one batch or in two calls, each half keeps its own outputs, and the count starts again."""
    case, end = JOINT[name], 5
    ours = case.build()
    schedule = method + AdaptiveGuidance(end)
    tgate_compile.optimize(ours, schedule, backend="eager")
    images = latents_of(ours, case.call(1))
    strip = tgate_compile.describe(ours).strip
    assert strip == schedule.strip(STEPS) == Schedule.of(method).strip(end) + Schedule.of(method).strip(3).lower()
    expected = reused_with_hooks(case.build(), case.call(1), strip)
    assert_same(images, expected)


def reused_with_hooks(pipe: Any, call: dict[str, Any], strip: str) -> torch.Tensor:
    """Reuse the outputs of attentions and feed-forwards by plain hooks, and drop the uncond half where `strip` does."""
    denoiser, original = pipe.transformer, pipe.transformer.forward
    separate = "QwenImage" in type(pipe).__name__
    state: dict[str, Any] = {"call": -1, "kept": {}}
    halves = ("cond", "uncond")

    def where() -> tuple[int, str]:
        step, number = state["call"], ""
        if separate:
            step, second = divmod(state["call"], 2)
            number = halves[second]
        return step, number

    def forward(*args: Any, **kwargs: Any) -> Any:
        state["call"] += 1
        step, half = where()
        if strip[step].isupper():
            return original(*args, **kwargs)
        if half == "uncond":
            return state["cond"]
        if separate:
            (output,) = original(*args, **kwargs)
            state["cond"] = (output.clone(),)
            return (output,)
        cut = {
            name: value.chunk(2)[1] if torch.is_tensor(value) and value.ndim and len(value) == 2 else value
            for name, value in kwargs.items()
        }
        (output,) = original(*args, **cut)
        return (torch.cat([output, output]),)

    def reuse(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            step, half = where()
            if strip[step] in "Ff":
                state["kept"][name, half] = output
                return output
            return state["kept"][name, half]

        return hook

    for name, module in denoiser.named_modules():
        if name.split(".")[-1] in ("attn", "attn2", "ff", "ff_context", "img_mlp", "txt_mlp"):
            module.register_forward_hook(reuse(name))
    denoiser.forward = forward
    return latents_of(pipe, call)
