"""Real pipelines through their unchanged call: against the hook reference, and against the plain pipeline."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import (
    PROMPT,
    PROMPTS,
    SIZE,
    VELOCITY,
    add_lora,
    controlnet,
    image,
    image_embeds,
    latent_consistency,
    load_ip_adapter,
    mask,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)


def compilations(pipe: Any) -> int:
    return pipe._tgate_compile.hook.store.compilations


def check(pipe: Any, call: dict[str, Any], gate: int = 3, keep: str = "uncond", **reference: Any) -> None:
    """Check that the optimized `pipe` matches the hook reference, twice, and the plain pipeline bitwise if ungated."""
    plain = run(pipe, **call)
    with hook_reference(pipe, gate, keep=keep, **reference):
        expected = run(pipe, **call)
    assert_differ(expected, plain)

    tgate_compile.optimize(pipe, gate, backend="eager", keep=keep)
    first = run(pipe, **call)
    assert_same(first, expected)
    assert torch.equal(run(pipe, **call), first)
    assert torch.equal(run(pipe, gate_step=1000, **call), plain)


def inpainting(**call: Any) -> dict[str, Any]:
    return {"image": image(), "mask_image": mask(), "height": SIZE, "width": SIZE, **call}


def with_ip_adapter() -> Any:
    pipe = stable_diffusion(layout="least")
    load_ip_adapter(pipe)
    return pipe


# The pipeline classes.


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_stable_diffusion(layout: str) -> None:
    check(stable_diffusion(layout=layout), {"negative_prompt": "dog"})


def test_sdxl() -> None:
    check(sdxl(), {}, interleaved=True)


def test_sdxl_keeps_the_negative_sizes_of_each_image() -> None:
    sizes = {"negative_original_size": (256, 128), "negative_target_size": (8, 64)}
    check(sdxl(), {"prompt": PROMPTS, **sizes}, interleaved=True)


def test_sdxl_keeps_the_positive_sizes_with_the_cond_half() -> None:
    sizes = {"negative_original_size": (256, 128), "negative_target_size": (8, 64)}
    check(sdxl(), {"prompt": PROMPTS, **sizes}, keep="cond", interleaved=True)


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_pixart(name: str) -> None:
    check(pixart(name), pixart_prompt())


def test_pixart_with_micro_conditions_and_two_prompts() -> None:
    check(pixart(micro_conditions=True), pixart_prompt(batch=2))


def test_lcm_with_embedded_guidance() -> None:
    check(latent_consistency(), {"steps": 4, "guidance_scale": 6.0}, gate=1, guided=False)


def test_lcm_with_embedded_guidance_through_the_ordinary_pipeline() -> None:
    pipe = latent_consistency("StableDiffusionPipeline")
    check(pipe, {"steps": 4, "guidance_scale": 6.0, "prompt": PROMPTS}, gate=2, guided=False)


@pytest.mark.parametrize("gate", [1, 2])
def test_lcm_with_guidance_off(gate: int) -> None:
    pipe = latent_consistency("StableDiffusionPipeline", embedded_guidance=False)
    check(pipe, {"steps": 4, "guidance_scale": 1.0, "prompt": PROMPTS}, gate=gate, guided=False)


@pytest.mark.parametrize(
    "name", ["EDMDPMSolverMultistepScheduler", pytest.param("EDMEulerScheduler", marks=pytest.mark.heavy)]
)
def test_playground(name: str) -> None:
    check(sdxl(scheduler=getattr(diffusers, name)()), {"guidance_scale": 3.0}, interleaved=True)


def test_img2img() -> None:
    check(
        stable_diffusion("StableDiffusionImg2ImgPipeline", layout="small"), {"image": image(), "strength": 0.9}, gate=2
    )


@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(channels: int) -> None:
    check(
        stable_diffusion("StableDiffusionInpaintPipeline", layout="small", in_channels=channels), inpainting(), gate=2
    )


@pytest.mark.heavy
def test_sdxl_img2img() -> None:
    pipe = sdxl("StableDiffusionXLImg2ImgPipeline")
    call = {"prompt": PROMPTS, "image": image(2), "strength": 0.9, "negative_original_size": (256, 128)}
    check(pipe, call, gate=2)


def test_sdxl_inpaint() -> None:
    check(sdxl("StableDiffusionXLInpaintPipeline"), inpainting(negative_original_size=(256, 128)), gate=2)


def test_controlnet() -> None:
    check(controlnet(), {"image": image(), "controlnet_conditioning_scale": 0.7})


def test_controlnet_that_stops_halfway() -> None:
    # From then on this pipeline still passes its residuals, as zeros.
    check(controlnet(), {"image": image(), "control_guidance_end": 0.6})


def test_ip_adapter() -> None:
    pipe = with_ip_adapter()
    check(pipe, {"ip_adapter_image_embeds": image_embeds(pipe)})


def test_ip_adapter_scale_changed_after_optimize() -> None:
    pipe = with_ip_adapter()
    call = {"ip_adapter_image_embeds": image_embeds(pipe)}
    tgate_compile.optimize(pipe, 3, backend="eager")
    before = run(pipe, **call)
    pipe.set_ip_adapter_scale(0.1)
    after = run(pipe, **call)
    tgate_compile.restore(pipe)
    with hook_reference(pipe, 3):
        expected = run(pipe, **call)
    assert_same(after, expected)
    assert_differ(after, before)


# Schedulers and call arguments. These tests share one pair of pipelines.


@pytest.fixture(scope="module")
def pipelines() -> SimpleNamespace:
    plain = stable_diffusion(layout="small")
    gated = tgate_compile.optimize(stable_diffusion(layout="small"), 3, backend="eager")
    return SimpleNamespace(plain=plain, gated=gated)


@pytest.fixture
def sd(pipelines: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Return a plain and an optimized Stable Diffusion pipeline with the same weights."""
    scheduler = pipelines.plain.scheduler
    yield pipelines
    pipelines.plain.scheduler = pipelines.gated.scheduler = scheduler


def expected_of(pipe: Any, call: dict[str, Any], gate: int = 3, **reference: Any) -> Any:
    with hook_reference(pipe, gate, **reference):
        return run(pipe, **call)


def check_pair(sd: SimpleNamespace, call: dict[str, Any], gate: int = 3, **reference: Any) -> None:
    """Check that the optimized pipeline matches the reference, and differs from the plain one."""
    expected = expected_of(sd.plain, call, gate, **reference)
    first = run(sd.gated, **call)
    assert_same(first, expected)
    assert torch.equal(run(sd.gated, **call), first)
    call = {name: value for name, value in call.items() if name != "gate_step"}
    plain = run(sd.plain, **call)
    assert_differ(expected, plain)
    assert torch.equal(run(sd.gated, gate_step=1000, **call), plain)


#: Number of calls per step, and of first calls that do not count as steps, written by hand.
SCHEDULERS = {
    "DDIMScheduler": (1, 0),
    "DDPMScheduler": (1, 0),
    "EulerDiscreteScheduler": (1, 0),
    "EulerAncestralDiscreteScheduler": (1, 0),
    "DPMSolverMultistepScheduler": (1, 0),
    "DPMSolverSinglestepScheduler": (1, 0),
    "UniPCMultistepScheduler": (1, 0),
    "DEISMultistepScheduler": (1, 0),
    "TCDScheduler": (1, 0),
    "LCMScheduler": (1, 0),
    "PNDMScheduler": (1, 1),
    "HeunDiscreteScheduler": (2, 0),
    "KDPM2DiscreteScheduler": (2, 0),
    "KDPM2AncestralDiscreteScheduler": (2, 0),
    "EDMDPMSolverMultistepScheduler": (1, 0),
    "EDMEulerScheduler": (1, 0),
}


def make_scheduler(name: str) -> Any:
    config = {} if name.startswith("EDM") else dict(VELOCITY)
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return getattr(diffusers, name).from_config(config)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(sd: SimpleNamespace, name: str) -> None:
    calls_per_step, warmup_calls = SCHEDULERS[name]
    sd.plain.scheduler = make_scheduler(name)
    sd.gated.scheduler = make_scheduler(name)
    check_pair(sd, {}, calls_per_step=calls_per_step, warmup_calls=warmup_calls)


@pytest.mark.parametrize(("name", "calls"), [("HeunDiscreteScheduler", 6), ("PNDMScheduler", 4), ("DDIMScheduler", 3)])
def test_full_calls_before_the_gate(sd: SimpleNamespace, name: str, calls: int) -> None:
    sd.gated.scheduler = make_scheduler(name)
    run(sd.gated)
    steps = tgate_compile.describe(sd.gated).last_steps
    assert [graph for _, graph in steps] == ["full"] * calls + ["pruned"] * (len(steps) - calls)
    assert {step for step, graph in steps if graph == "full"} == {0, 1, 2}


def test_several_prompts(sd: SimpleNamespace) -> None:
    check_pair(sd, {"prompt": PROMPTS, "negative_prompt": ["dog", "snow"]})


def test_several_images_per_prompt(sd: SimpleNamespace) -> None:
    check_pair(sd, {"prompt": PROMPTS, "num_images_per_prompt": 2})


def test_images_of_a_batch_do_not_mix(sd: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    both = run(sd.gated, PROMPTS, latents=latents)
    for index in range(2):
        alone = run(sd.gated, PROMPTS[index], latents=latents[index : index + 1])
        # Other batch sizes use other kernels: equal up to rounding, amplified by six steps.
        assert difference(both[index : index + 1], alone) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_two_prompts_are_not_two_halves(sd: SimpleNamespace, scale: float) -> None:
    # The same latents twice: only the call's arguments distinguish this batch from [uncond; cond].
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    call = {"prompt": PROMPTS, "guidance_scale": scale, "latents": latents}
    check_pair(sd, call, guided=False)
    assert_differ(*run(sd.gated, **call).chunk(2))


def test_guidance_rescale(sd: SimpleNamespace) -> None:
    check_pair(sd, {"guidance_rescale": 0.7})


@pytest.mark.parametrize("scale", [1.5, 20.0])
def test_guidance_scale(sd: SimpleNamespace, scale: float) -> None:
    check_pair(sd, {"guidance_scale": scale})


def test_keep_cond() -> None:
    pipe = stable_diffusion(layout="small")
    check(pipe, {"prompt": PROMPTS, "negative_prompt": ["dog", "dog"]}, keep="cond")


def test_keep_matters_where_text_is_pooled() -> None:
    pipe = sdxl()
    images = []
    for keep in ("uncond", "cond"):
        tgate_compile.optimize(pipe, 3, backend="eager", keep=keep)
        images.append(run(pipe))
        tgate_compile.restore(pipe)
    assert_differ(*images)


@pytest.mark.parametrize(("gate", "steps", "full"), [(0.5, 6, 3), (0.34, 6, 2), (0.4, 5, 2), (0.01, 6, 1), (5, 6, 5)])
def test_gate_step_of_one_call(sd: SimpleNamespace, gate: int | float, steps: int, full: int) -> None:
    expected = expected_of(sd.plain, {"steps": steps}, full)
    assert_same(run(sd.gated, steps=steps, gate_step=gate), expected)
    assert tgate_compile.describe(sd.gated).strip == "F" * full + "p" * (steps - full)
    # It applies only to that call.
    run(sd.gated)
    assert tgate_compile.describe(sd.gated).strip == "FFFppp"


def test_gate_step_as_fraction() -> None:
    pipe = tgate_compile.optimize(stable_diffusion(layout="small"), 0.5, backend="eager")
    assert_same(run(pipe), expected_of(stable_diffusion(layout="small"), {}, 3))
    assert tgate_compile.describe(pipe).strip == "FFFppp"
    run(pipe, steps=4)
    assert tgate_compile.describe(pipe).strip == "FFpp"


@pytest.mark.parametrize("gate", [6, 7, 100])
def test_gate_at_the_end_is_the_plain_pipeline(sd: SimpleNamespace, gate: int) -> None:
    for output_type in ("latent", "np"):
        call = {"prompt": PROMPTS, "output_type": output_type}
        plain, ours = run(sd.plain, **call), run(sd.gated, gate_step=gate, **call)
        assert (plain == ours).all()


def test_output_types(sd: SimpleNamespace) -> None:
    with hook_reference(sd.plain, 3):
        expected = run(sd.plain, output_type="np")
    array = run(sd.gated, output_type="np")
    assert array.shape == (1, SIZE, SIZE, 3)
    assert np.abs(array - expected).max() <= 1e-5
    tensor = run(sd.gated, output_type="pt")
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    (pil,) = run(sd.gated, output_type="pil")
    assert pil.size == (SIZE, SIZE)
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype("uint8"))


def test_return_dict(sd: SimpleNamespace) -> None:
    expected = run(sd.gated)
    generator = torch.Generator().manual_seed(0)
    images, _ = sd.gated(PROMPT, num_inference_steps=6, generator=generator, output_type="latent", return_dict=False)
    assert torch.equal(images, expected)


def test_positional_arguments(sd: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    # prompt, height, width, num_inference_steps, timesteps, sigmas, guidance_scale
    given = sd.gated(PROMPT, SIZE, SIZE, 6, None, None, 1.0, generator=generator, output_type="latent").images
    assert torch.equal(given, run(sd.gated, guidance_scale=1.0))
    assert_differ(given, run(sd.gated))


def test_signature_of_the_call(sd: SimpleNamespace) -> None:
    ours = inspect.signature(type(sd.gated).__call__)
    theirs = inspect.signature(type(sd.plain).__call__)
    assert ours.parameters["gate_step"].kind is inspect.Parameter.KEYWORD_ONLY
    rest = [parameter for name, parameter in ours.parameters.items() if name != "gate_step"]
    assert rest == list(theirs.parameters.values())
    assert sd.gated.__call__.__doc__ == sd.plain.__call__.__doc__


def test_custom_timesteps(sd: SimpleNamespace) -> None:
    sd.plain.scheduler = make_scheduler("EulerDiscreteScheduler")
    sd.gated.scheduler = make_scheduler("EulerDiscreteScheduler")
    check_pair(sd, {"timesteps": [900, 700, 500, 300, 100, 50]})


def test_embedded_prompts(sd: SimpleNamespace) -> None:
    with torch.no_grad():
        embeds, negative = sd.plain.encode_prompt(PROMPT, "cpu", 1, True, "dog")
    given = run(sd.gated, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(given, run(sd.gated, PROMPT, negative_prompt="dog"))


def test_progress_bar(sd: SimpleNamespace) -> None:
    written = io.StringIO()
    sd.gated.set_progress_bar_config(file=written, disable=False, ascii=True)
    try:
        run(sd.gated)
    finally:
        sd.gated.set_progress_bar_config(disable=True)
    assert "6/6" in written.getvalue()


# Callbacks.


def test_callback_that_changes_latents(sd: SimpleNamespace) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.9 + 0.01 * step}

    check_pair(sd, {"callback_on_step_end": change})
    assert_differ(run(sd.gated, callback_on_step_end=change), run(sd.gated))


@pytest.mark.parametrize("at", [0, 2, 4])
def test_callback_that_changes_the_prompt(sd: SimpleNamespace, at: int) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if step == at else {}

    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    check_pair(sd, call)
    same = torch.equal(run(sd.gated, **call), run(sd.gated))
    assert same == (at >= 2)  # once the cache is filled the prompt has no effect


@pytest.mark.parametrize("at", [1, 2, 4])
def test_callback_that_interrupts(sd: SimpleNamespace, at: int) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == at
        return tensors

    call = {"callback_on_step_end": interrupt}
    # diffusers' loop skips the steps while the flag is set.
    assert_same(run(sd.gated, **call), expected_of(sd.plain, call))
    assert len(tgate_compile.describe(sd.gated).last_steps) == at + 1
    assert_same(run(sd.gated), expected_of(sd.plain, {}))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_official_callback_that_stops_guidance(sd: SimpleNamespace, at: int) -> None:
    call = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=at)}
    check_pair(sd, call, guided=lambda: sd.plain.do_classifier_free_guidance)


def test_official_callback_that_stops_guidance_of_sdxl() -> None:
    pipe = sdxl()
    call = {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    check(pipe, call, interleaved=True, guided=lambda: pipe.do_classifier_free_guidance)


def test_official_callback_that_stops_the_ip_adapter() -> None:
    pipe = with_ip_adapter()
    call = {"ip_adapter_image_embeds": image_embeds(pipe)}
    with_adapter = run(pipe, **call)
    call["callback_on_step_end"] = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    expected = expected_of(pipe, call)
    pipe.set_ip_adapter_scale(0.8)
    tgate_compile.optimize(pipe, 3, backend="eager")
    for _ in range(2):
        assert_same(run(pipe, **call), expected)
        pipe.set_ip_adapter_scale(0.8)
    plain = run(pipe, **call, gate_step=1000)
    assert_differ(plain, with_adapter)
    assert_differ(expected, plain)


# LoRA, and weights that change.


def with_lora() -> Any:
    pipe = stable_diffusion(layout="least")
    add_lora(pipe.unet)
    return pipe


def test_lora_added_before_optimize() -> None:
    pipe = with_lora()
    check(pipe, {})
    assert_differ(run(pipe, gate_step=1000), run(stable_diffusion(layout="least")))


def test_lora_scale_in_the_call() -> None:
    pipe = with_lora()
    check(pipe, {"cross_attention_kwargs": {"scale": 0.3}})
    # Another scale needs another graph, in which it is a constant.
    for scale in (0.9, 0.3):
        call = {"cross_attention_kwargs": {"scale": scale}}
        assert_same(run(pipe, **call), expected_of(with_lora(), call))


def test_lora_loaded_from_a_file(tmp_path: Any) -> None:
    from peft import get_peft_model_state_dict

    pipe = stable_diffusion(layout="least")
    source = with_lora()
    source.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(source.unet))
    pipe.load_lora_weights(tmp_path)
    check(pipe, {})
    assert_same(run(pipe, gate_step=1000), run(source))


def test_lora_loaded_and_unloaded_after_optimize(tmp_path: Any) -> None:
    from peft import get_peft_model_state_dict

    source = with_lora()
    source.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(source.unet))
    pipe = tgate_compile.optimize(stable_diffusion(layout="least"), 3, backend="eager")
    before = run(pipe)
    pipe.load_lora_weights(tmp_path)
    assert_same(run(pipe), expected_of(source, {}))
    pipe.unload_lora_weights()
    assert_same(run(pipe), before)


def double_lora(unet: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)


def change_ordinary_weights(unet: torch.nn.Module) -> None:
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.2)
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name or "ff.net.2" in name:
                parameter.mul_(1.3)


def replace_data(unet: torch.nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone() * 1.01


def load_state(unet: torch.nn.Module) -> None:
    unet.load_state_dict({name: 1.01 * value for name, value in unet.state_dict().items()}, assign=False)


@pytest.mark.parametrize("change", [double_lora, change_ordinary_weights, replace_data, load_state])
def test_weights_changed_in_place_after_optimize(change: Callable[[torch.nn.Module], None]) -> None:
    pipe = tgate_compile.optimize(with_lora(), 3, backend="eager")
    before = run(pipe)
    made = compilations(pipe)
    change(pipe.unet)
    after = run(pipe)
    assert compilations(pipe) == made
    reference = with_lora()
    change(reference.unet)
    assert_same(after, expected_of(reference, {}))
    assert torch.equal(run(pipe, gate_step=1000), run(reference))
    assert_differ(after, before)


def weights_assigned(pipe: Any) -> None:
    state = {name: 1.01 * value for name, value in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(state, assign=True)
    pipe.unet.requires_grad_(False)


def other_scale(pipe: Any) -> None:
    pipe.set_adapters("default", 0.3)


def second_adapter(pipe: Any) -> None:
    add_lora(pipe.unet, "other", seed=20)
    pipe.set_adapters(["default", "other"], [0.5, 0.7])


def fused(pipe: Any) -> None:
    pipe.fuse_lora(lora_scale=0.7)


def disabled(pipe: Any) -> None:
    pipe.unet.disable_adapters()


def deleted(pipe: Any) -> None:
    pipe.unet.delete_adapters("default")


@pytest.mark.parametrize("change", [weights_assigned, other_scale, second_adapter, fused, disabled, deleted])
def test_adapters_changed_after_optimize(change: Callable[[Any], None]) -> None:
    pipe = tgate_compile.optimize(with_lora(), 3, backend="eager")
    before = run(pipe)
    change(pipe)
    after = run(pipe)
    reference = with_lora()
    change(reference)
    assert_same(after, expected_of(reference, {}))
    assert torch.equal(run(pipe, gate_step=1000), run(reference))
    assert_differ(after, before)


def test_adapters_disabled_and_enabled_again() -> None:
    pipe = tgate_compile.optimize(with_lora(), 3, backend="eager")
    before = run(pipe)
    pipe.unet.disable_adapters()
    assert_differ(run(pipe), before)
    pipe.unet.enable_adapters()
    assert_same(run(pipe), before)


def test_lora_fused_and_unfused_again() -> None:
    pipe = tgate_compile.optimize(with_lora(), 3, backend="eager")
    before = run(pipe)
    pipe.fuse_lora()
    assert difference(run(pipe), before) < 1e-4
    pipe.unfuse_lora()
    assert difference(run(pipe), before) < 1e-4
