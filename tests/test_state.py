"""No state leaks between calls, out of failed calls, or to anything outside the optimized pipeline."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tgate_compile
from tests.comparing import assert_differ, assert_same, difference
from tests.hook_reference import hook_reference
from tests.tiny_pipelines import (
    PROMPT,
    PROMPTS,
    SIZE,
    VELOCITY,
    image,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)


def small(name: str = "StableDiffusionPipeline") -> Any:
    return stable_diffusion(name, layout="small")


def optimized(gate: int | float = 3, **options: Any) -> Any:
    return tgate_compile.optimize(small(), gate, backend="eager", **options)


def expected_of(pipe: Any, call: dict[str, Any], gate: int = 3, **reference: Any) -> Any:
    with hook_reference(pipe, gate, **reference):
        return run(pipe, **call)


def compilations(pipe: Any) -> int:
    return pipe._tgate_compile.hook.store.compilations


@pytest.fixture(scope="module")
def pipelines() -> SimpleNamespace:
    plain = small()
    return SimpleNamespace(plain=plain, gated=optimized(), expected=expected_of(plain, {}), image=run(plain))


@pytest.fixture
def sd(pipelines: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Return a plain and an optimized pipeline with the same weights, and their images, shared by many tests."""
    scheduler = pipelines.plain.scheduler
    yield pipelines
    pipelines.plain.scheduler = pipelines.gated.scheduler = scheduler


# Calls that fail.


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_call_after_an_exception_in_a_callback(sd: SimpleNamespace, at: int, error: type[BaseException]) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise error
        return tensors

    with pytest.raises(error):
        run(sd.gated, callback_on_step_end=fail)
    assert torch.equal(run(sd.gated), sd.expected)


def test_call_after_an_exception_in_the_scheduler(sd: SimpleNamespace) -> None:
    class Failing(diffusers.EulerDiscreteScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            if self.step_index == 4:
                raise BrokenError
            return super().step(*args, **kwargs)

    scheduler = sd.gated.scheduler
    sd.gated.scheduler = Failing(**VELOCITY)
    with pytest.raises(BrokenError):
        run(sd.gated)
    sd.gated.scheduler = scheduler
    assert torch.equal(run(sd.gated), sd.expected)


def test_call_after_one_that_never_began(sd: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="has to be in"):
        run(sd.gated, callback_on_step_end_tensor_inputs=["nonsense"])
    with pytest.raises(tgate_compile.ConfigurationError, match="gate_step"):
        run(sd.gated, gate_step=0)
    assert torch.equal(run(sd.gated), sd.expected)


def test_call_after_an_interrupt(sd: SimpleNamespace) -> None:
    for at in (1, 4):

        def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], at: int = at) -> dict[str, Any]:
            pipe._interrupt = step == at
            return tensors

        run(sd.gated, callback_on_step_end=interrupt)
        assert torch.equal(run(sd.gated), sd.expected)


def test_caches_are_freed_after_the_call(sd: SimpleNamespace) -> None:
    run(sd.gated)
    assert sd.gated._tgate_compile.hook.last._caches.nbytes == 0
    assert sd.gated._tgate_compile.hook._hook._active is None


# Calls that differ from the previous one.


def test_calls_of_all_kinds_in_turn(sd: SimpleNamespace) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"height": 2 * SIZE, "width": SIZE + 8},
        {"prompt": PROMPTS},
        {"steps": 9},
        {"guidance_scale": 1.0},
        {"prompt": PROMPTS, "guidance_scale": 1.0},
        {"steps": 4},
    ]
    expected = [expected_of(sd.plain, call, guided=call.get("guidance_scale") != 1.0) for call in calls]
    for call, image_ in zip(calls, expected, strict=True):
        assert_same(run(sd.gated, **call), image_)
    made = compilations(sd.gated)
    for index in (1, 4, 0, 5, 3, 2, 6, 0):
        assert_same(run(sd.gated, **calls[index]), expected[index])
    assert compilations(sd.gated) == made, "shapes seen before were compiled again"


def test_fewer_steps_than_the_gate_and_then_more(sd: SimpleNamespace) -> None:
    assert torch.equal(run(sd.gated, steps=2), run(sd.plain, steps=2))
    assert torch.equal(run(sd.gated), sd.expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtype(dtype: torch.dtype) -> None:
    pipe, plain = optimized(), small().to(dtype)
    before = run(pipe)
    pipe.to(dtype)
    after = run(pipe)
    assert after.dtype == dtype
    # The reference averages the halves in their own dtype, but the graph averages bfloat16 in single precision.
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    assert difference(after, expected_of(plain, {})) <= tolerance
    assert torch.equal(run(pipe, gate_step=1000), run(plain))
    if dtype == torch.float64:
        pipe.to(torch.float32)
        assert_same(run(pipe), before)


def test_scheduler_replaced(sd: SimpleNamespace) -> None:
    for name, calls in [("HeunDiscreteScheduler", 2), ("EulerDiscreteScheduler", 1), ("KDPM2DiscreteScheduler", 2)]:
        scheduler = getattr(diffusers, name)
        sd.plain.scheduler = scheduler.from_config(sd.plain.scheduler.config)
        sd.gated.scheduler = scheduler.from_config(sd.gated.scheduler.config)
        assert_same(run(sd.gated), expected_of(sd.plain, {}, calls_per_step=calls))


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.75, 6), (1.0, 8)])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_strength(img2img: SimpleNamespace, scheduler: str, strength: float, steps: int) -> None:
    # Steps are the loop's: half the strength means half the steps, and a fractional gate is relative to these.
    calls, warmup = {"HeunDiscreteScheduler": (2, 0), "PNDMScheduler": (1, 1)}.get(scheduler, (1, 0))
    for pipe in (img2img.plain, img2img.gated):
        config = {**VELOCITY, "skip_prk_steps": True} if warmup else VELOCITY
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    call = {"image": image(), "strength": strength, "steps": 8}
    expected = expected_of(img2img.plain, call, steps // 2, calls_per_step=calls, warmup_calls=warmup)
    assert_same(run(img2img.gated, **call), expected)
    assert tgate_compile.describe(img2img.gated).strip == "F" * (steps // 2) + "p" * (steps // 2)
    assert torch.equal(run(img2img.gated, gate_step=steps, **call), run(img2img.plain, **call))


@pytest.fixture(scope="module")
def img2img() -> SimpleNamespace:
    name = "StableDiffusionImg2ImgPipeline"
    return SimpleNamespace(plain=small(name), gated=tgate_compile.optimize(small(name), 0.5, backend="eager"))


def test_sdxl_base_and_refiner() -> None:
    base, refiner = sdxl(), sdxl("StableDiffusionXLImg2ImgPipeline")
    first = {"steps": 10, "denoising_end": 0.6}
    second = {"steps": 10, "denoising_start": 0.6}
    expected = expected_of(base, first, 3, interleaved=True)
    refined = expected_of(refiner, {"image": expected, **second}, 2)
    for pipe in (base, refiner):
        tgate_compile.optimize(pipe, 0.5, backend="eager")
    latents = run(base, **first)
    assert_same(latents, expected)
    assert tgate_compile.describe(base).strip == "FFFppp"
    assert_same(run(refiner, image=latents, **second), refined)
    assert tgate_compile.describe(refiner).strip == "FFpp"


def test_inference_mode_and_then_not(sd: SimpleNamespace) -> None:
    pipe = optimized()
    with torch.inference_mode():
        assert_same(run(pipe), sd.expected)
    assert_same(run(pipe), sd.expected)
    pipe = optimized()
    assert_same(run(pipe), sd.expected)
    with torch.inference_mode():
        assert_same(run(pipe), sd.expected)


def test_autocast_is_refused(sd: SimpleNamespace) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(tgate_compile.ConfigurationError, match=r"autocast.*pipe\.to"),
    ):
        run(sd.gated)
    assert torch.equal(run(sd.gated), sd.expected)


# Changes to the denoiser after `optimize`.


def eager_attention(pipe: Any) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def fused_attention(pipe: Any) -> None:
    pipe.unet.set_attn_processor(AttnProcessor2_0())


def fused_qkv(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def other_activation(pipe: Any) -> None:
    pipe.unet.conv_act = torch.nn.ReLU()


@pytest.mark.parametrize(
    ("change", "visible"),
    [
        (eager_attention, False),
        (fused_attention, False),
        (fused_qkv, False),
        (freeu, True),
        (channels_last, False),
        (other_activation, True),
    ],
)
def test_denoiser_changed_after_optimize(change: Callable[[Any], None], visible: bool) -> None:
    pipe, plain = optimized(), small()
    before = run(pipe)
    change(pipe)
    change(plain)
    after = run(pipe)
    assert_same(after, expected_of(plain, {}))
    assert torch.equal(run(pipe, gate_step=1000), run(plain))
    assert (difference(after, before) > 1e-3) == visible


def test_freeu_on_and_off_again() -> None:
    pipe = optimized()
    before = run(pipe)
    freeu(pipe)
    assert_differ(run(pipe), before)
    pipe.disable_freeu()
    assert_same(run(pipe), before)


def test_fused_qkv_and_unfused_again() -> None:
    pipe = optimized()
    before = run(pipe)
    pipe.unet.fuse_qkv_projections()
    assert_same(run(pipe), before)
    pipe.unet.unfuse_qkv_projections()
    assert_same(run(pipe), before)


@pytest.mark.parametrize("change", [eager_attention, fused_qkv, channels_last])
def test_denoiser_changed_before_optimize(change: Callable[[Any], None]) -> None:
    pipe = small()
    change(pipe)
    expected = expected_of(pipe, {})
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert_same(run(pipe), expected)


def test_fused_projections_of_pixart() -> None:
    pipe = pixart()
    expected = expected_of(pipe, pixart_prompt())
    tgate_compile.optimize(pipe, 3, backend="eager")
    pipe.transformer.fuse_qkv_projections()
    assert_same(run(pipe, **pixart_prompt()), expected)


def test_denoiser_replaced(sd: SimpleNamespace) -> None:
    pipe = optimized()
    other = small()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.3)
    pipe.unet = other.unet
    with pytest.raises(tgate_compile.ConfigurationError, match=r"unet.*replaced.*restore"):
        run(pipe)
    tgate_compile.restore(pipe)
    plain = run(pipe)
    assert torch.equal(plain, run(other))
    expected = expected_of(other, {})
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert_same(run(pipe), expected)


def test_training_flags_do_not_matter(sd: SimpleNamespace) -> None:
    pipe = optimized()
    pipe.unet.requires_grad_(True)
    result = run(pipe)
    assert not result.requires_grad
    assert_same(result, sd.expected)


def test_model_offload_hook_keeps_working(sd: SimpleNamespace) -> None:
    # The hook that `enable_model_cpu_offload` adds to each component. Only that method needs an accelerator.
    from accelerate import cpu_offload_with_hook

    pipe = small()
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert_same(run(pipe), sd.expected)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe), sd.image)
    hook.remove()


# Restoring.


def snapshot(thing: Any) -> dict[str, Any]:
    return dict(vars(thing))


def assert_unchanged(thing: Any, before: dict[str, Any]) -> None:
    now = vars(thing)
    assert list(now) == list(before)
    assert all(now[name] is before[name] for name in before)


def test_restore_is_exact(sd: SimpleNamespace) -> None:
    pipe = small()
    call = StableDiffusionPipeline.__call__
    run(pipe)  # diffusers adds attributes
    before, before_unet = snapshot(pipe), snapshot(pipe.unet)
    tgate_compile.optimize(pipe, 3, backend="eager")
    assert type(pipe) is not StableDiffusionPipeline
    assert_differ(run(pipe), sd.image)
    assert tgate_compile.restore(pipe) is pipe
    assert type(pipe) is StableDiffusionPipeline
    assert set(vars(pipe)) == set(before)
    assert_unchanged(pipe.unet, before_unet)
    assert "forward" not in vars(pipe.unet)
    assert not hasattr(pipe.unet, "_diffusers_hook")
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.unet.modules())
    assert StableDiffusionPipeline.__call__ is call
    assert torch.equal(run(pipe), sd.image)


def test_restore_keeps_earlier_attributes() -> None:
    pipe = small()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    forward = pipe.unet.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    patched.__wrapped__ = forward  # type: ignore[attr-defined]
    pipe.unet.forward = patched
    before = snapshot(pipe.unet)
    expected = expected_of_patched = run(pipe)
    tgate_compile.optimize(pipe, 1000, backend="eager")
    assert torch.equal(run(pipe), expected_of_patched)
    tgate_compile.restore(pipe)
    assert_unchanged(pipe.unet, before)
    assert pipe.unet.forward is patched
    assert pipe.unet._diffusers_hook is registry
    assert torch.equal(run(pipe), expected)


def test_restore_frees_the_graphs() -> None:
    pipe = optimized()
    run(pipe)
    store = weakref.ref(pipe._tgate_compile.hook.store)
    tgate_compile.restore(pipe)
    gc.collect()
    assert store() is None


def test_optimize_again_in_another_way(sd: SimpleNamespace) -> None:
    pipe = optimized(2)
    run(pipe)
    tgate_compile.optimize(tgate_compile.restore(pipe), 3, backend="eager")
    assert_same(run(pipe), sd.expected)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe), sd.image)


def test_optimize_returns_the_pipeline_itself() -> None:
    pipe = small()
    assert tgate_compile.optimize(pipe, 3, backend="eager") is pipe
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe, StableDiffusionPipeline)
    assert type(pipe).__module__ == StableDiffusionPipeline.__module__


def test_other_pipelines_of_the_class_are_left_alone(sd: SimpleNamespace) -> None:
    run(sd.gated)
    assert type(sd.plain) is StableDiffusionPipeline
    assert "gate_step" not in inspect.signature(StableDiffusionPipeline.__call__).parameters
    assert torch.equal(run(sd.plain), sd.image)


# Denoiser calls outside a generation.


def denoiser_inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(500), torch.randn(batch, 16, 32, generator=generator)


def test_denoiser_outside_a_generation_is_plain(sd: SimpleNamespace) -> None:
    run(sd.gated)
    inputs = denoiser_inputs()
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(sd.gated.unet(*inputs).sample, sd.plain.unet(*inputs).sample)


def test_denoiser_can_be_trained_outside_a_generation() -> None:
    pipe = optimized()
    run(pipe)
    pipe.unet.requires_grad_(True)
    pipe.unet(*denoiser_inputs()).sample.square().mean().backward()
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert pipe.unet.get_parameter(name).grad.abs().max() > 0
    pipe.unet.requires_grad_(False)


def test_copies_are_refused(sd: SimpleNamespace) -> None:
    # A copy of a module with diffusers' hooks runs with the weights of the original.
    run(sd.gated)
    for thing in (sd.gated.unet, sd.gated):
        with pytest.raises(tgate_compile.ConfigurationError, match="restore"):
            copy.deepcopy(thing)
    assert torch.equal(run(sd.gated), sd.expected)
    pipe = optimized()
    tgate_compile.restore(pipe)
    copied = copy.deepcopy(pipe)
    assert torch.equal(run(copied), sd.image)
    tgate_compile.optimize(copied, 3, backend="eager")
    assert_same(run(copied), sd.expected)


def test_save_and_load(sd: SimpleNamespace, tmp_path: Any) -> None:
    sd.gated.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    for loader in (StableDiffusionPipeline, diffusers.DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is StableDiffusionPipeline
        assert torch.equal(run(loaded), sd.image)
    assert torch.equal(run(sd.gated), sd.expected)


def test_components_shared_with_a_plain_pipeline(sd: SimpleNamespace) -> None:
    call = {"image": image(), "strength": 0.8}
    expected = run(small("StableDiffusionImg2ImgPipeline"), **call)
    assert set(sd.gated.components) == set(sd.plain.components)
    shared = StableDiffusionImg2ImgPipeline(**sd.gated.components, requires_safety_checker=False)
    from_pipe = StableDiffusionImg2ImgPipeline.from_pipe(sd.gated)
    for pipe in (shared, from_pipe):
        assert type(pipe) is StableDiffusionImg2ImgPipeline
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(run(pipe, **call), expected)
        assert torch.equal(run(sd.gated), sd.expected)


# Custom loops.


def own_loop(pipe: Any, guided: bool = True, start: int = 0, fail_at: int | None = None) -> torch.Tensor:
    """Run the pipeline's loop, written out."""
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pipe.scheduler.set_timesteps(6)
        for index, timestep in enumerate(pipe.scheduler.timesteps[start:]):
            if index == fail_at:
                raise BrokenError
            if guided:
                batch, text = torch.cat([latents] * 2), torch.cat([negative, embeds])
            else:
                batch, text = latents, embeds
            noise = pipe.unet(batch, timestep, encoder_hidden_states=text).sample
            if guided:
                uncond, cond = noise.chunk(2)
                noise = uncond + 7.5 * (cond - uncond)
            latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("guided", [True, False])
def test_own_loop(sd: SimpleNamespace, guided: bool) -> None:
    with hook_reference(sd.plain, 3, guided=guided):
        expected = own_loop(sd.plain, guided)
    plain = own_loop(sd.plain, guided)
    assert_differ(expected, plain)
    for _ in range(2):
        with tgate_compile.generation(sd.gated, guidance=guided):
            assert_same(own_loop(sd.gated, guided), expected)
        assert torch.equal(own_loop(sd.gated, guided), plain)
    with tgate_compile.generation(sd.gated, guidance=guided, gate_step=6):
        assert torch.equal(own_loop(sd.gated, guided), plain)


def test_own_loop_over_some_of_the_timesteps(sd: SimpleNamespace) -> None:
    with hook_reference(sd.plain, 2):
        expected = own_loop(sd.plain, start=2)
    with tgate_compile.generation(sd.gated, guidance=True, gate_step=0.5, num_timesteps=4):
        assert_same(own_loop(sd.gated, start=2), expected)
    assert tgate_compile.describe(sd.gated).strip == "FFpp"


def test_own_loop_that_breaks(sd: SimpleNamespace) -> None:
    with pytest.raises(BrokenError), tgate_compile.generation(sd.gated, guidance=True):
        own_loop(sd.gated, fail_at=4)
    assert torch.equal(own_loop(sd.gated), own_loop(sd.plain))
    assert torch.equal(run(sd.gated), sd.expected)


def test_own_loop_without_timesteps() -> None:
    pipe = optimized()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(**VELOCITY)
    pipe.scheduler.timesteps = None
    with (
        pytest.raises(tgate_compile.ConfigurationError, match="set_timesteps"),
        tgate_compile.generation(pipe, guidance=True),
        torch.no_grad(),
    ):
        pipe.unet(*denoiser_inputs())


def test_own_loop_with_a_batch_that_is_not_two_halves(sd: SimpleNamespace) -> None:
    for batch in (2, 3):
        with (
            pytest.raises(tgate_compile.UnsupportedModelError, match="halves"),
            tgate_compile.generation(sd.gated, guidance=True),
            torch.no_grad(),
        ):
            sd.gated.unet(*denoiser_inputs(batch))


# One generation at a time.


def test_two_threads(sd: SimpleNamespace) -> None:
    in_the_middle, go_on = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            in_the_middle.set()
            assert go_on.wait(60)
        return tensors

    thread = threading.Thread(target=lambda: results.append(run(sd.gated, callback_on_step_end=wait)))
    thread.start()
    try:
        assert in_the_middle.wait(60)
        for _ in range(2):
            with pytest.raises(tgate_compile.ConcurrentGenerationError, match="One generation at a time"):
                run(sd.gated)
        with (
            pytest.raises(tgate_compile.ConcurrentGenerationError),
            tgate_compile.generation(sd.gated, guidance=True),
        ):
            pass
        with pytest.raises(tgate_compile.ConcurrentGenerationError):
            sd.gated.unet(*denoiser_inputs())
        with pytest.raises(tgate_compile.ConcurrentGenerationError):
            tgate_compile.restore(sd.gated)
    finally:
        go_on.set()
        thread.join(60)
    assert len(results) == 1
    # If a refused call had touched the scheduler, this image would be wrong.
    assert torch.equal(results[0], sd.expected)
    assert torch.equal(run(sd.gated), sd.expected)


def test_call_within_a_call(sd: SimpleNamespace) -> None:
    def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(tgate_compile.ConcurrentGenerationError):
            run(pipe)
        return tensors

    assert torch.equal(run(sd.gated, callback_on_step_end=nested), sd.expected)


# Hooks and patches on the denoiser.


def test_model_offload_hook_put_on_after_optimize(sd: SimpleNamespace) -> None:
    from accelerate import cpu_offload_with_hook

    pipe = optimized()
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    assert_same(run(pipe), sd.expected)
    hook.remove()
    assert_same(run(pipe), sd.expected)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe), sd.image)


def test_restore_leaves_hooks_that_were_put_on_later(sd: SimpleNamespace) -> None:
    class Doubling(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            return tuple(2 * value for value in output) if isinstance(output, tuple) else output

    pipe = optimized()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Doubling(), "doubling")
    tgate_compile.restore(pipe)
    hooked = run(pipe)
    assert_differ(hooked, sd.image)
    reference = small()
    HookRegistry.check_if_exists_or_initialize(reference.unet).register_hook(Doubling(), "doubling")
    assert torch.equal(hooked, run(reference))
    pipe.unet._diffusers_hook.remove_hook("doubling")
    assert torch.equal(run(pipe), sd.image)


@pytest.mark.heavy
def test_denoiser_changed_in_the_middle_of_an_own_loop() -> None:
    def loop(pipe: Any) -> torch.Tensor:
        unet = pipe.unet
        calls = 0
        forward = pipe.scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
            return forward(*args, **kwargs)

        pipe.scheduler.step = step
        try:
            return own_loop(pipe)
        finally:
            del pipe.scheduler.step
            unet.disable_freeu()

    plain, gated = small(), optimized()
    with hook_reference(plain, 3):
        expected = loop(plain)
    with hook_reference(plain, 3):
        assert_differ(expected, own_loop(plain))
    with tgate_compile.generation(gated, guidance=True):
        assert_same(loop(gated), expected)


def test_a_hook_that_was_taken_off_is_noticed() -> None:
    """Removing accelerate's hook restores the earlier forward and drops ours, which must not go unnoticed."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = small()
    plain = run(pipe)
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    tgate_compile.optimize(pipe, 3, backend="eager")
    run(pipe)
    remove_hook_from_module(pipe.unet)
    with pytest.raises(tgate_compile.ConfigurationError, match="ran without tgate_compile"):
        run(pipe)
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe), plain)
