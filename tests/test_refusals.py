"""Refusals state what was given and what to do, and leave the pipeline unchanged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cache_dit
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.hooks import HookRegistry, ModelHook

import tgate_compile
from tests.hook_reference import hook_reference
from tests.refusing import refused, untouched
from tests.tiny_pipelines import (
    TEXT_DIM,
    image,
    image_embeds,
    load_ip_adapter,
    pixart,
    run,
    sdxl,
    stable_diffusion,
)
from tests.tiny_transformers import stable_diffusion_3
from tests.tiny_video import ltx, ltx_call
from tgate_compile import ConfigurationError, UnsupportedModelError


@pytest.fixture(scope="module")
def shared() -> SimpleNamespace:
    pipe = stable_diffusion(layout="small")
    return SimpleNamespace(pipe=pipe, image=run(pipe))


# Arguments.


@pytest.mark.parametrize(
    "gate",
    [0, -1, -0.5, 0.0, 1.0, 1.5, 10.0, True, False, "10", float("nan"), float("inf"), [10], np.float64(1.5)],
)
def test_gate_step(shared: SimpleNamespace, gate: Any) -> None:
    message = refused(shared.pipe, ConfigurationError, "gate_step", "at least 1", "between 0 and 1", gate_step=gate)
    assert f"got {gate!r}" in message
    assert torch.equal(run(shared.pipe), shared.image)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"gate_step": None}, ("Nothing to do", "gate_step")),
        ({"gate_step": None, "sp_interval": 3}, ("sp_interval", "need a gate_step")),
        ({"sp_interval": 0}, ("sp_interval", "at least 1", "got 0")),
        ({"warm_up": -1}, ("warm_up", "at least 0", "got -1")),
        ({"deepcache_interval": 2.5}, ("deepcache_interval", "got 2.5")),
        (
            {"deepcache_interval": 3, "deepcache_branch": 40},
            ("deepcache_branch=40 does not exist", "Choose a smaller one"),
        ),
        ({"guidance_step": 5}, ("gate_step", "guidance_step", "Set one of them")),
        ({"gate_step": None, "guidance_similarity": 2}, ("guidance_similarity", "got 2")),
    ],
)
def test_schedules(shared: SimpleNamespace, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(shared.pipe, ConfigurationError, *parts, **options)


def test_deepcache_needs_a_unet() -> None:
    refused(pixart("PixArtAlphaPipeline"), UnsupportedModelError, "needs a UNet", gate_step=None, deepcache_interval=3)


def test_a_gate_for_one_call_needs_a_gate() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), None, guidance_step=2, backend="eager")
    with pytest.raises(ConfigurationError, match="optimized without a gate"):
        run(pipe, gate_step=3)


@pytest.mark.parametrize("gate", [0, -1, 1.0, 1.5, True, "3", float("nan")])
def test_gate_step_of_one_call(gate: Any) -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    with pytest.raises(ConfigurationError, match="gate_step"):
        run(pipe, gate_step=gate)
    with (
        pytest.raises(ConfigurationError, match="gate_step"),
        tgate_compile.generation(pipe, guidance=True, gate_step=gate),
    ):
        pass
    assert tgate_compile.describe(pipe).last_steps == ()


@pytest.mark.parametrize("gate", [np.int64(3), torch.tensor(3), np.float64(0.5)])
def test_gate_step_of_other_number_types(shared: SimpleNamespace, gate: Any) -> None:
    tgate_compile.optimize(shared.pipe, gate, backend="eager")
    assert tgate_compile.describe(shared.pipe).gate_step in (3, 0.5)
    assert type(tgate_compile.describe(shared.pipe).gate_step) in (int, float)
    tgate_compile.restore(shared.pipe)


@pytest.mark.parametrize("backend", ["tensorflow", "Inductor", "", None, 1, ["eager"]])
def test_backend(shared: SimpleNamespace, backend: Any) -> None:
    refused(shared.pipe, ConfigurationError, '"inductor"', '"eager"', '"auto"', f"got {backend!r}", backend=backend)


@pytest.mark.parametrize("keep", ["both", "", 0, ["uncond"]])
def test_keep(shared: SimpleNamespace, keep: Any) -> None:
    refused(shared.pipe, ConfigurationError, '"uncond"', '"cond"', f"got {keep!r}", keep=keep)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"anchor_weight": "half"}, "anchor_weight must be a number"),
        ({"anchor_weight": float("nan")}, "anchor_weight must be a number"),
        ({"anchor_weight": True}, "anchor_weight must be a number"),
        ({"anchor_weight": 1.0, "gate_step": None, "guidance_step": 3}, "needs a gate_step"),
    ],
)
def test_anchor_weights(shared: SimpleNamespace, options: Any, part: str) -> None:
    refused(shared.pipe, ConfigurationError, part, **options)


@pytest.mark.parametrize(
    ("backend", "options", "part"),
    [
        ("inductor", {"max_autotun": True}, "max_autotun"),
        ("eager", {"max_autotune": True}, "no options"),
        ("auto", {"max_autotune": True}, "named backend"),
        ("inductor", ["max_autotune"], "mapping"),
        ("inductor", "max_autotune", "mapping"),
    ],
)
def test_backend_options(shared: SimpleNamespace, backend: str, options: Any, part: str) -> None:
    refused(shared.pipe, ConfigurationError, part, backend=backend, backend_options=options)


def test_options_are_keywords_only(shared: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        tgate_compile.optimize(shared.pipe, 3, "eager")  # type: ignore[misc]
    with pytest.raises(TypeError):
        tgate_compile.optimize(shared.pipe, 3, back_end="eager")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "NoneType"),
        ("stabilityai/stable-diffusion-2-1", "str"),
        (diffusers.StableDiffusionPipeline, "the class StableDiffusionPipeline"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
)
def test_no_pipeline(given: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match="from_pretrained") as caught:
        tgate_compile.optimize(given)
    assert named in str(caught.value)


def test_a_denoiser_alone(shared: SimpleNamespace) -> None:
    with pytest.raises(ConfigurationError, match="UNet2DConditionModel"):
        tgate_compile.optimize(shared.pipe.unet)


# Pipelines in a state that cannot work.


def test_already_optimized() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    first = run(pipe)
    refused(pipe, ConfigurationError, "already optimized", "StableDiffusionPipeline", "restore")
    assert torch.equal(run(pipe), first)


def test_no_denoiser() -> None:
    pipe = stable_diffusion(layout="small")
    pipe.unet = None
    with pytest.raises(ConfigurationError, match="StableDiffusionPipeline has no denoiser"):
        tgate_compile.optimize(pipe)


def test_compiled_denoiser() -> None:
    pipe = stable_diffusion(layout="small")
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    refused(pipe, ConfigurationError, "torch.compile", "uncompiled")
    pipe.unet = plain
    pipe.unet.compile()
    refused(pipe, ConfigurationError, "torch.compile", "uncompiled")


def test_sequential_offload() -> None:
    from accelerate import cpu_offload

    pipe = stable_diffusion(layout="small")
    # The same as `enable_sequential_cpu_offload`, which needs an accelerator.
    cpu_offload(pipe.unet, torch.device("cpu"))
    refused(pipe, ConfigurationError, "AlignDevicesHook", "remove_all_hooks")


def test_layerwise_casting() -> None:
    pipe = stable_diffusion(layout="small")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refused(pipe, ConfigurationError, "layerwise_casting", "layer by layer")


def test_group_offloading_in_a_block() -> None:
    pipe = stable_diffusion(layout="small")
    HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block).register_hook(ModelHook(), "group_offloading")
    refused(pipe, ConfigurationError, "group_offloading")


def test_offloading_turned_on_after_optimize() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    first = run(pipe)
    from accelerate import cpu_offload

    cpu_offload(pipe.unet.mid_block, torch.device("cpu"))
    with pytest.raises(tgate_compile.TGateError, match="AlignDevicesHook"):
        run(pipe)
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(pipe.unet.mid_block)
    assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("function", [tgate_compile.restore, tgate_compile.describe])
@pytest.mark.parametrize("given", ["pipeline", None, "text"])
def test_not_optimized(shared: SimpleNamespace, function: Callable[[Any], Any], given: Any) -> None:
    thing = shared.pipe if given == "pipeline" else given
    with untouched(shared.pipe), pytest.raises(ConfigurationError, match=r"not optimized.*optimize\(pipe"):
        function(thing)


def test_generation_of_a_plain_pipeline(shared: SimpleNamespace) -> None:
    with pytest.raises(ConfigurationError, match="not optimized"), tgate_compile.generation(shared.pipe, guidance=True):
        pass


# Models and pipelines that cannot be gated.


def test_joint_attention_keeps_the_prompts_half() -> None:
    refused(stable_diffusion_3(), ConfigurationError, "keep='uncond'", "only its cond half", keep="uncond")
    refused(stable_diffusion_3(), ConfigurationError, "anchor_weight=0.7", "no meaningful mean", anchor_weight=0.7)


def test_unconditional_unet() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    pipe = diffusers.DDPMPipeline(unet, DDPMScheduler())
    refused(pipe, UnsupportedModelError, "UNet2DModel", "no cross-attention")


def test_unet_without_attention() -> None:
    pipe = stable_diffusion(layout="small")
    pipe.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_DIM,
        down_block_types=("DownBlock2D",),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",),
    )
    refused(pipe, UnsupportedModelError, "UNet2DConditionModel", "no cross-attention")


def test_instruct_pix2pix() -> None:
    pipe = stable_diffusion("StableDiffusionInstructPix2PixPipeline", layout="small", in_channels=8)
    call = {"image": image(), "guidance_scale": 5.0, "image_guidance_scale": 1.5}
    plain = run(pipe, **call)
    refused(pipe, UnsupportedModelError, "InstructPix2Pix", "three", "What works instead")
    assert torch.equal(run(pipe, **call), plain)


def test_instruct_pix2pix_sdxl() -> None:
    pipe = sdxl("StableDiffusionXLInstructPix2PixPipeline")
    refused(pipe, UnsupportedModelError, "StableDiffusionXLInstructPix2PixPipeline", "three", "What works instead")


def test_perturbed_attention_guidance() -> None:
    pipe = stable_diffusion("StableDiffusionPAGPipeline", layout="small")
    refused(pipe, UnsupportedModelError, "StableDiffusionPAGPipeline", "perturbed guidance", "from_pipe")
    refused(sdxl("StableDiffusionXLPAGPipeline"), UnsupportedModelError, "StableDiffusionXLPAGPipeline")


def test_subclass_of_a_refused_pipeline() -> None:
    class Mine(diffusers.StableDiffusionInstructPix2PixPipeline):
        pass

    parts = stable_diffusion(layout="small", in_channels=8).components
    pipe = Mine(**parts, requires_safety_checker=False)
    refused(pipe, UnsupportedModelError, "Mine", "three")


# Patches by other packages, and other changes to a denoiser.


def test_deepcache_helper() -> None:
    deepcache = pytest.importorskip("DeepCache")
    pipe = stable_diffusion()

    def enabled() -> Any:
        helper = deepcache.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        return helper

    helper = enabled()
    refused(pipe, UnsupportedModelError, "package DeepCache", "helper.disable()", "deepcache_interval")
    helper.disable()
    tgate_compile.optimize(pipe, 3, backend="eager")
    expected = run(pipe)
    helper = enabled()
    with pytest.raises(UnsupportedModelError, match=r"package DeepCache.*helper\.disable\(\)"):
        run(pipe)
    helper.disable()
    assert torch.equal(run(pipe), expected)


def test_cache_dit() -> None:
    pipe = ltx()
    cache_dit.enable_cache(pipe)
    with pytest.raises(UnsupportedModelError, match=r"package cache_dit.*cache_dit\.disable_cache\(pipe\)"):
        tgate_compile.optimize(pipe, 2, backend="eager")
    cache_dit.disable_cache(pipe)
    tgate_compile.optimize(pipe, 2, backend="eager")
    cache_dit.enable_cache(pipe)
    with pytest.raises(UnsupportedModelError, match="package cache_dit"):
        pipe(**ltx_call(), num_inference_steps=4, output_type="latent")


def test_the_authors_own_package() -> None:
    tgate = pytest.importorskip("tgate")
    pipe = tgate.TgateSDLoader(stable_diffusion(), gate_step=3, num_inference_steps=4)
    pipe.tgate("red cat", gate_step=3, num_inference_steps=4, output_type="latent")
    with pytest.raises(UnsupportedModelError, match="package tgate has changed 'down_blocks"):
        tgate_compile.optimize(pipe, 3, backend="eager")


CACHES: dict[str, Callable[[Any], Any]] = {
    "fbc_": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "pyramid_attention_broadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    ),
    "faster_cache": lambda pipe: diffusers.FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep),
    "taylorseer_cache": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks.0.attn1"]),
    "mag_cache": lambda pipe: diffusers.MagCacheConfig(num_inference_steps=4, calibrate=True),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_diffusers(cache: str) -> None:
    pipe = ltx()
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    with pytest.raises(ConfigurationError, match=rf"diffusers' hook '{cache}.*disable_cache\(\)"):
        tgate_compile.optimize(pipe, 2, backend="eager")
    pipe.transformer.disable_cache()
    tgate_compile.optimize(pipe, 2, backend="eager")
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    with pytest.raises(ConfigurationError, match=rf"diffusers' hook '{cache}"):
        pipe(**ltx_call(), num_inference_steps=4, output_type="latent")


def test_compiled_after_optimize() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    expected = run(pipe)
    pipe.unet.compile(backend="eager")
    with pytest.raises(ConfigurationError, match=r"unet.*torch\.compile since.*_compiled_call_impl = None"):
        run(pipe)
    pipe.unet._compiled_call_impl = None
    assert torch.equal(run(pipe), expected)


def test_replaced_forward(shared: SimpleNamespace) -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    expected, forward = run(pipe), pipe.unet.forward
    pipe.unet.forward = shared.pipe.unet.forward
    with pytest.raises(ConfigurationError, match="its forward has been replaced since the pipeline was optimized"):
        run(pipe)
    # Wrapping the previous forward is harmless.
    seen = []
    pipe.unet.forward = lambda *args, **kwargs: seen.append(type(args[0])) or forward(*args, **kwargs)
    assert torch.equal(run(pipe), expected)
    assert seen == [torch.Tensor] * 6
    pipe.unet.forward = forward
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("copies", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies(copies: Callable[[Any], Any]) -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    for thing in (pipe, pipe.unet)[: 1 if copies is copy.copy else 2]:
        with pytest.raises(ConfigurationError, match=r"cannot be copied or pickled.*restore\(pipe\)"):
            copies(thing)


@pytest.mark.parametrize("options", [{}, {"on_unsupported": "plain"}])
def test_no_steps(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    call = {"image": image(), "strength": 0.05}
    plain = run(stable_diffusion("StableDiffusionImg2ImgPipeline", layout="small"), **call)
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", layout="small")
    tgate_compile.optimize(pipe, 3, backend="eager", **options)
    assert torch.equal(run(pipe, **call), plain)
    assert tgate_compile.describe(pipe).strip == ""
    assert caplog.records == []


def test_a_refusal_does_not_stand_in_the_way_of_a_good_call() -> None:
    pipe = stable_diffusion(layout="small")
    load_ip_adapter(pipe)
    call = {"ip_adapter_image_embeds": image_embeds(pipe)}
    refused(pipe, ConfigurationError, "gate_step", gate_step=0)
    with hook_reference(pipe, 3):
        expected = run(pipe, **call)
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert torch.equal(run(pipe, **call), expected)
