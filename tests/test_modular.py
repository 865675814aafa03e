"""Modular pipelines: the guider makes a separate denoiser call for each prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DDIMScheduler,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    LayerSkipConfig,
    LTX2Guidance,
    ModularPipelineBlocks,
    PerturbedAttentionGuidance,
    PNDMScheduler,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
    WanTransformer3DModel,
)
from diffusers.guiders import BaseGuidance, MagnitudeAwareGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.modular_pipelines.components_manager import custom_offload_with_hook
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser

import tgate_compile
from tests import tiny_modular, tiny_video
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import TwoCalls, played
from tests.tiny_modular import STEPS, modular_sdxl, modular_sdxl_call, modular_wan, modular_wan_call, run
from tests.tiny_pipelines import VELOCITY, add_lora, image
from tgate_compile import BundleError, ConfigurationError, UnsupportedModelError

GATE = 3

_SDXL_SITES = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
)
_WAN_SITES = ("blocks.0.attn2", "blocks.1.attn2")


@dataclass(frozen=True)
class Case:
    """One modular pipeline: how to build and call it, and the cross-attentions of its denoisers."""

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    sites: tuple[str, ...]
    denoisers: tuple[str, ...] = ("transformer",)
    gate: int = GATE
    strip: str = "FFFppp"


CASES = {
    "SDXL": Case(modular_sdxl, modular_sdxl_call, _SDXL_SITES, ("unet",)),
    "Wan": Case(modular_wan, modular_wan_call, _WAN_SITES),
    "Wan 2.2": Case(
        lambda: modular_wan(0.5), modular_wan_call, _WAN_SITES, ("transformer", "transformer_2"), 1, "Fppp|Fp"
    ),
    "LTX": Case(
        tiny_modular.modular_ltx,
        tiny_video.ltx_call,
        ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"),
    ),
}
#: Guiders that need two predictions, and return the same if both are equal.
SUPPORTED: dict[str, Callable[[], Any]] = {
    "ClassifierFreeGuidance": lambda: ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
    "ClassifierFreeGuidance, original": lambda: ClassifierFreeGuidance(
        guidance_scale=4.0, use_original_formulation=True
    ),
    "ClassifierFreeZeroStarGuidance": ClassifierFreeZeroStarGuidance,
    "AdaptiveProjectedGuidance": AdaptiveProjectedGuidance,
    "AdaptiveProjectedMixGuidance": lambda: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_momentum=None),
    "MagnitudeAwareGuidance": MagnitudeAwareGuidance,
    "TangentialClassifierFreeGuidance": TangentialClassifierFreeGuidance,
}
_SKIP = LayerSkipConfig(indices=[0], fqn="mid_block.attentions", skip_attention=False, skip_ff=True)
#: Guiders that are refused, and the reason in the message.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "PerturbedAttentionGuidance": (lambda: PerturbedAttentionGuidance(perturbed_guidance_layers=[0]), "pred_cond_skip"),
    "SkipLayerGuidance": (lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]), "pred_cond_skip"),
    "SmoothedEnergyGuidance": (lambda: SmoothedEnergyGuidance(seg_guidance_layers=[0]), "pred_cond_seg"),
    "LTX2Guidance": (LTX2Guidance, "pred_cond_modality"),
    "AutoGuidance": (lambda: AutoGuidance(auto_guidance_config=_SKIP), "prepare_models"),
    "AdaptiveProjectedGuidance": (
        lambda: AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
        "momentum",
    ),
    "AdaptiveProjectedMixGuidance": (AdaptiveProjectedMixGuidance, "momentum"),
}


def expected_of(case: Case, pipe: Any, call: dict[str, Any], gate: int | None = None) -> torch.Tensor:
    """Run `pipe(**call)` with T-GATE by plain hooks."""
    with ExitStack() as stack:
        for name, guider in zip(case.denoisers, ("guider", "guider_2"), strict=False):
            denoiser = getattr(pipe, name)
            reference = TwoCalls(
                denoiser, gate or case.gate, guided=lambda guider=guider: getattr(pipe, guider).num_conditions > 1
            )
            stack.enter_context(played(reference, denoiser, case.sites))
        return run(pipe, **call)


@dataclass(frozen=True)
class Pair:
    """A plain pipeline and an equal optimized one, for tests that share captured graphs."""

    case: Case
    plain: Any
    gated: Any

    def check(self, guider: Any, strip: str) -> None:
        """Check both with `guider`: gated against the hooks, ungated bitwise against plain."""
        call = self.case.call(2)
        for pipe in (self.plain, self.gated):
            pipe.update_components(guider=guider.new())
        plain, expected = run(self.plain, **call), expected_of(self.case, self.plain, call)
        assert_differ(plain, expected)
        assert_same(run(self.gated, **call), expected)
        assert tgate_compile.describe(self.gated).strip == strip
        assert tgate_compile.describe(self.gated, num_inference_steps=STEPS, **call).strip == strip
        assert torch.equal(run(self.gated, gate_step=STEPS, **call), plain)


def _pair(name: str) -> Pair:
    case = CASES[name]
    return Pair(case, case.build(), tgate_compile.optimize(case.build(), case.gate, backend="eager"))


@pytest.fixture(scope="module")
def wan() -> Pair:
    return _pair("Wan")


@pytest.fixture(scope="module")
def ltx() -> Pair:
    return _pair("LTX")


@pytest.fixture
def sdxl() -> Any:
    return modular_sdxl()


# Supported guiders and loops.


# LTX is also checked below, with each guider.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy) if name == "LTX" else name for name in CASES]
)
def test_gated_as_by_hooks_and_ungated_to_the_bit(name: str) -> None:
    case = CASES[name]
    pipe, call = case.build(), case.call(2)
    kind = type(pipe)
    plain, expected = run(pipe, **call), expected_of(case, pipe, call)
    assert_differ(plain, expected)
    before = [dict(vars(getattr(pipe, name))) for name in case.denoisers]  # LTX's blocks leave a registry of hooks
    assert tgate_compile.optimize(pipe, case.gate, backend="eager") is pipe
    assert type(pipe).__name__ == kind.__name__
    assert isinstance(pipe, kind)
    gated = run(pipe, **call)
    assert_same(gated, expected)
    assert tgate_compile.describe(pipe).strip == case.strip
    assert tgate_compile.describe(pipe, num_inference_steps=STEPS, **call).strip == case.strip
    assert torch.equal(run(pipe, gate_step=STEPS, **call), plain)
    assert torch.equal(run(pipe, **call), gated)
    tgate_compile.restore(pipe)
    assert type(pipe) is kind
    assert "_tgate_compile" not in vars(pipe)
    assert [dict(vars(getattr(pipe, name))) for name in case.denoisers] == before
    assert torch.equal(run(pipe, **call), plain)


@pytest.mark.parametrize("name", SUPPORTED)
def test_guiders_with_two_predictions(name: str, ltx: Pair) -> None:
    # LTX's predictions are tokens, the only kind that MagnitudeAwareGuidance takes.
    ltx.check(SUPPORTED[name](), "FFFppp")


# Guidance is on in some of the steps or none: it stops before or after the gate, or begins late.
@pytest.mark.parametrize(
    ("start", "stop", "strip"),
    [
        (0.0, 0.0, "fffppp"),
        (0.0, 0.34, "FFfppp"),
        (0.0, 0.84, "FFFppp"),
        (0.17, 1.0, "fFFppp"),
        (0.17, 0.34, "fFfppp"),
    ],
)
def test_guidance_in_part_of_the_steps(start: float, stop: float, strip: str, wan: Pair) -> None:
    wan.check(ClassifierFreeGuidance(guidance_scale=5.0, start=start, stop=stop), strip)


def test_no_guidance_by_its_scale(wan: Pair) -> None:
    wan.check(ClassifierFreeGuidance(guidance_scale=1.0), "fffppp")


def test_guidance_that_begins_after_the_gate_is_refused() -> None:
    pipe = modular_wan()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0, start=0.7))
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(ConfigurationError, match="never act"):
        run(pipe, **modular_wan_call())


def test_another_guider_or_scheduler_is_picked_up() -> None:
    case, pipe = CASES["SDXL"], modular_sdxl()
    call = case.call(1)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    first = run(pipe, **call)
    pipe.update_components(
        guider=ClassifierFreeGuidance(guidance_scale=3.0), scheduler=DDIMScheduler(**VELOCITY, clip_sample=False)
    )
    second = run(pipe, **call)
    assert_differ(first, second)
    tgate_compile.restore(pipe)
    assert_same(second, expected_of(case, pipe, call))


# PNDM's warm-up call does not count as a step; Heun's steps have two timesteps.
@pytest.mark.parametrize(("scheduler", "strip"), [(PNDMScheduler, "FFFFppp"), (HeunDiscreteScheduler, "FFFFFFppppp")])
def test_steps_of_other_schedulers(scheduler: Any, strip: str) -> None:
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipe = modular_sdxl(scheduler(**VELOCITY, **options))
    tgate_compile.optimize(pipe, 0.5, backend="eager")
    run(pipe, **modular_sdxl_call())
    state = pipe._tgate_compile.hook.last.steps
    assert len(state) <= 2 * len(strip)
    assert {step for step, _ in state} == set(range(STEPS))
    assert {step for step, phase in state if phase.reuse} == {3, 4, 5}


# A fractional gate is a fraction of the loop's steps.
@pytest.mark.parametrize(
    ("call", "steps"),
    [({"strength": 0.7}, 7), ({"strength": 0.7, "denoising_end": 0.5}, 2), ({"denoising_end": 0.6}, 6)],
)
@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, pytest.param(HeunDiscreteScheduler, marks=pytest.mark.heavy)]
)
def test_steps_of_a_part_of_the_timesteps(call: dict[str, Any], steps: int, scheduler: Any) -> None:
    pipe = modular_sdxl(scheduler(**VELOCITY))
    if "strength" in call:
        call = {**call, "image": image()}
    tgate_compile.optimize(pipe, 0.5, backend="eager")
    run(pipe, steps=10, **modular_sdxl_call(), **call)
    ran = pipe._tgate_compile.hook.last.steps
    count = len({step for step, _ in ran})
    assert count == steps if scheduler is EulerDiscreteScheduler else count >= steps
    assert {step for step, phase in ran if phase.reuse} == set(range(max(1, round(0.5 * count)), count))


@pytest.mark.heavy
def test_cached_self_attention_and_deep_features() -> None:
    pipe = modular_sdxl()
    call = modular_sdxl_call(2)
    plain = run(pipe, **call)
    for options in ({"sp_interval": 2, "warm_up": 1}, {"deepcache_interval": 2}):
        tgate_compile.optimize(pipe, 4, backend="eager", **options)
        assert_differ(run(pipe, **call), plain)
        assert torch.equal(run(pipe, gate_step=1, **call), run(pipe, gate_step=1, **call))
        tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, None, guidance_step=3, backend="eager")
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=7.5))
    stopped = run(pipe, **call)
    tgate_compile.restore(pipe)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=7.5, stop=0.5))
    assert_same(stopped, run(pipe, **call))


def test_a_lora_that_is_added_later_is_seen() -> None:
    case, pipe = CASES["SDXL"], modular_sdxl()
    call = case.call(1)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    before = run(pipe, **call)
    add_lora(pipe.unet)
    gated = run(pipe, **call)
    assert_differ(before, gated)
    tgate_compile.restore(pipe)
    assert_same(gated, expected_of(case, pipe, call))


def test_state_goes_in_and_out() -> None:
    pipe, call = modular_wan(), modular_wan_call()
    state = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=STEPS, **call)
    again = pipe(state=state, output=["latents"])["latents"]
    tgate_compile.optimize(pipe, GATE, backend="eager")
    assert torch.equal(pipe(state=state, gate_step=STEPS, output=["latents"])["latents"], again)
    assert_differ(pipe(state, "latents"), again)


def test_a_loop_of_ones_own(wan: Pair) -> None:
    pipe, call = wan.gated, modular_wan_call(2)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    pipe.scheduler.set_timesteps(4)
    latents = call["latents"]
    with tgate_compile.generation(pipe, guidance=True, gate_step=2):
        for t in pipe.scheduler.timesteps:
            cond, uncond = (
                pipe.transformer(
                    hidden_states=latents,
                    timestep=t.expand(2),
                    attention_kwargs=None,
                    encoder_hidden_states=call[text],
                    return_dict=False,
                )[0]
                for text in ("prompt_embeds", "negative_prompt_embeds")
            )
            latents = pipe.scheduler.step(uncond + 5.0 * (cond - uncond), t, latents, return_dict=False)[0]
    assert tgate_compile.describe(pipe).strip == "FFpp"
    assert_same(latents, run(pipe, 4, gate_step=2, **call))


@pytest.mark.heavy
def test_a_bundle(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    call = modular_wan_call()
    pipe = tgate_compile.optimize(modular_wan(), GATE, backend="eager")
    tgate_compile.export(pipe, tmp_path / "wan", call={**call, "num_inference_steps": STEPS}, dynamic=False)
    served = tgate_compile.load(modular_wan(), tmp_path / "wan")
    assert_same(run(served, **call), run(pipe, **call))
    with pytest.raises(BundleError, match="LTXModularPipeline"):
        tgate_compile.load(tiny_modular.modular_ltx(), tmp_path / "wan")


def test_describe_tells_beforehand(sdxl: Any, caplog: pytest.LogCaptureFixture) -> None:
    tgate_compile.optimize(sdxl, GATE, backend="eager")
    with caplog.at_level(logging.ERROR, "diffusers"):
        beforehand = tgate_compile.describe(sdxl, num_inference_steps=STEPS, **modular_sdxl_call())
    assert not caplog.records
    assert beforehand.strip == "FFFppp"
    assert beforehand.pipeline == "StableDiffusionXLModularPipeline"
    run(sdxl, **modular_sdxl_call())
    afterwards = tgate_compile.describe(sdxl)
    assert beforehand.cache_bytes == afterwards.cache_bytes
    assert beforehand.sites == afterwards.sites
    tgate_compile.restore(sdxl)


# Refusals and their reasons.


@pytest.mark.parametrize("name", REFUSED)
def test_refused_guiders(name: str, sdxl: Any) -> None:
    make, reason = REFUSED[name]
    own = sdxl.guider
    tgate_compile.optimize(sdxl, GATE, backend="eager")
    sdxl.update_components(guider=make())
    with pytest.raises(UnsupportedModelError, match=f"(?s)with the guider {name}: .*{reason}"):
        run(sdxl, **modular_sdxl_call())
    tgate_compile.restore(sdxl)
    with pytest.raises(UnsupportedModelError, match=f"(?s)with the guider {name}: .*{reason}"):
        tgate_compile.optimize(sdxl, GATE, backend="eager")
    assert type(sdxl) is diffusers.StableDiffusionXLModularPipeline
    sdxl.update_components(guider=own)


def test_every_guider_of_diffusers_is_supported_or_refused() -> None:
    known = {name.split(",")[0] for name in SUPPORTED} | set(REFUSED) | {"FrequencyDecoupledGuidance"}  # needs kornia
    ours = [c for c in _subclasses(BaseGuidance) if c.__module__.startswith("diffusers.")]
    assert {c.__name__ for c in ours} == known


def test_frequency_decoupled_guidance() -> None:
    pytest.importorskip("kornia", reason="FrequencyDecoupledGuidance needs it")
    case, pipe = CASES["SDXL"], modular_sdxl()  # its pyramids need images
    pipe.update_components(guider=diffusers.FrequencyDecoupledGuidance(guidance_scales=[5.0, 3.0]))
    expected = expected_of(case, pipe, case.call(1))
    tgate_compile.optimize(pipe, GATE, backend="eager")
    assert_same(run(pipe, **case.call(1)), expected)


def _subclasses(kind: type) -> list[type]:
    return [c for direct in kind.__subclasses__() for c in (direct, *_subclasses(direct))]


class UncondFirst(ClassifierFreeGuidance):  # type: ignore[misc]
    def prepare_inputs(self, data: Any) -> Any:
        return super().prepare_inputs(data)[::-1]


class Sharpened(ClassifierFreeGuidance):  # type: ignore[misc]
    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        made = super().forward(pred_cond, pred_uncond)
        return GuiderOutput(pred=1.1 * made.pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


@pytest.mark.parametrize(("make", "reason"), [(UncondFirst, "conditions uncond, cond"), (Sharpened, "equal predict")])
def test_guiders_of_ones_own_are_tried(make: Any, reason: str, sdxl: Any) -> None:
    own = sdxl.guider
    sdxl.update_components(guider=make())
    with pytest.raises(UnsupportedModelError, match=reason):
        tgate_compile.optimize(sdxl, GATE, backend="eager")
    sdxl.update_components(guider=own)


def test_another_denoiser_is_an_error_until_it_is_optimized() -> None:
    pipe = tgate_compile.optimize(modular_wan(), GATE, backend="eager")
    first = pipe.transformer
    pipe.update_components(transformer=tiny_video.wan_transformer(1))
    with pytest.raises(ConfigurationError, match="transformer of this WanModularPipeline has been replaced"):
        run(pipe, **modular_wan_call())
    tgate_compile.restore(pipe)
    assert "forward" not in vars(first)
    tgate_compile.optimize(pipe, GATE, backend="eager")


def test_components_that_are_not_loaded() -> None:
    pipe = diffusers.StableDiffusionXLModularPipeline()
    with pytest.raises(ConfigurationError, match=r"components unet, scheduler of .*load_components"):
        tgate_compile.optimize(pipe, GATE)
    pipe = tgate_compile.optimize(modular_wan(), GATE, backend="eager")
    pipe.unload_components("scheduler")
    with pytest.raises(ConfigurationError, match="scheduler of this WanModularPipeline are not loaded"):
        run(pipe, **modular_wan_call())


@pytest.mark.parametrize("name", ["Flux", "ErnieImage"])
def test_joint_attention(name: str) -> None:
    pipe = getattr(diffusers, f"{name}ModularPipeline")()
    pipe.update_components(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=_JOINT[name]())
    with pytest.raises(UnsupportedModelError, match=r"is a modular pipeline, and .* has joint attention"):
        tgate_compile.optimize(pipe, GATE)
    assert "_tgate_compile" not in vars(pipe)


_JOINT: dict[str, Callable[[], Any]] = {
    "Flux": lambda: FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "ErnieImage": lambda: ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, text_in_dim=32, rope_axes_dim=(4, 4, 8)
    ),
}


@pytest.mark.parametrize("name", ["Flux", "ErnieImage", "StableDiffusionXL"])
def test_a_class_is_no_pipeline(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the class {name}ModularPipeline"):
        tgate_compile.optimize(getattr(diffusers, f"{name}ModularPipeline"))


class Unguided(WanLoopDenoiser):  # type: ignore[misc]
    """Blocks without a guider, as for a distilled model."""

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("transformer", WanTransformer3DModel)]


def test_without_a_guider() -> None:
    pipe = modular_wan()
    _loop(pipe).sub_blocks["denoiser"] = Unguided(
        {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds")}
    )
    unguided = tiny_modular.with_components(pipe.blocks, {"transformer": pipe.transformer, "scheduler": pipe.scheduler})
    with pytest.raises(UnsupportedModelError, match="use no guider"):
        tgate_compile.optimize(unguided, GATE)


@pytest.mark.parametrize("name", ["WanAnimate2Blocks", "HeliosAutoBlocks"])
def test_videos_that_are_denoised_part_by_part(name: str) -> None:
    pipe = tiny_modular.with_components(
        getattr(diffusers, name)(),
        {"transformer": tiny_video.wan_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler()},
    )
    with pytest.raises(UnsupportedModelError, match="part by part"):
        tgate_compile.optimize(pipe, GATE)


class Again(ModularPipelineBlocks):  # type: ignore[misc]
    """Runs the whole loop a second time, as FreeInit does."""

    model_name = "wan"

    def __call__(self, components: Any, state: Any) -> Any:
        components.scheduler.set_timesteps(2)
        return _loop(components)(components, state)


def test_a_loop_that_starts_over() -> None:
    def make() -> Any:
        pipe = modular_wan()
        pipe._blocks.sub_blocks["denoise"].sub_blocks["again"] = Again()
        return pipe

    pipe = tgate_compile.optimize(make(), 1000, backend="eager")
    assert torch.equal(run(pipe, 2, **modular_wan_call()), run(make(), 2, **modular_wan_call()))
    run(pipe, 2, gate_step=1, **modular_wan_call())
    assert tgate_compile.describe(pipe).strip == "FpFp"


class Preview(ModularPipelineBlocks):  # type: ignore[misc]
    """Calls the denoiser once more in every step, after the guider's calls."""

    model_name = "wan"

    @property
    def expected_components(self) -> list[Any]:
        return []

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        components.transformer(
            block_state.latents, t[None], encoder_hidden_states=block_state.prompt_embeds, return_dict=False
        )
        return components, block_state


def test_a_block_that_calls_the_denoiser_by_itself() -> None:
    pipe = modular_wan()
    _loop(pipe).sub_blocks["preview"] = Preview()
    run(pipe, **modular_wan_call())
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(
        UnsupportedModelError, match="transformer of this WanModularPipeline was called, but not for a prediction"
    ):
        run(pipe, **modular_wan_call())


def _loop(pipe: Any) -> Any:
    return pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"]


def test_tools_for_ordinary_pipelines_are_refused(sdxl: Any, tmp_path: Path) -> None:
    for call in (
        lambda: tgate_compile.tune(sdxl, ["a cat"]),
        lambda: tgate_compile.optimize(sdxl, "auto"),
        lambda: tgate_compile.analyze(sdxl, ["a cat"]),
        lambda: tgate_compile.evaluate(sdxl, {"gate": tgate_compile.Schedule(3)}, ["a cat"], tmp_path / "images"),
    ):
        with pytest.raises(ConfigurationError, match="ordinary diffusers pipeline"):
            call()


# `enable_auto_cpu_offload` itself needs a device that reports its free memory.
@pytest.mark.parametrize("first", ["hook", pytest.param("optimize", marks=pytest.mark.heavy)])
def test_the_offload_hook_of_a_components_manager(first: str) -> None:
    pipe, call = modular_wan(), modular_wan_call()
    plain = run(pipe, **call)
    steps = {
        "hook": lambda: custom_offload_with_hook("transformer", pipe.transformer, execution_device="cpu"),
        "optimize": lambda: tgate_compile.optimize(pipe, GATE, backend="eager"),
    }
    for name in sorted(steps, key=lambda name: name != first):
        steps[name]()
    assert torch.equal(run(pipe, gate_step=STEPS, **call), plain)
    assert_differ(run(pipe, **call), plain)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe, **call), plain)


class AddsLora(ModularPipelineBlocks):  # type: ignore[misc]
    """Changes the denoiser during the loop."""

    model_name = "wan"

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        if i == GATE:
            add_lora(components.transformer)
        return components, block_state


def test_a_block_that_changes_the_denoiser(wan: Pair) -> None:
    call = wan.case.call(2)
    wan.gated.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    results = []
    for gated in (False, True):
        pipe = modular_wan()
        _loop(pipe).sub_blocks["lora"] = AddsLora()
        if gated:
            tgate_compile.optimize(pipe, GATE, backend="eager")
        results.append(run(pipe, **call) if gated else expected_of(wan.case, pipe, call))
    assert_same(*results)
    assert_differ(run(wan.gated, **call), results[0])
