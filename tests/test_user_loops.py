"""Denoising loops as users write them: loops other than two halves in one pass are detected or refused."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, WanPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import tgate_compile
from tests import tiny_video
from tests.comparing import assert_differ, assert_same
from tests.hook_reference import hook_reference
from tests.own_loops import NO_TEXT, TEXTS, Looping, looping
from tests.tiny_pipelines import VELOCITY, add_lora, run, stable_diffusion

GATE = 3


def gated(pipe: Any, gate: float = GATE, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, gate, backend="eager", **options)


def check(make: Callable[[], Any], call: Callable[[Any], torch.Tensor], gate: int = GATE, **options: Any) -> str:
    """Check the ungated pipeline bitwise against the plain one, and the gated one against hooks; return the strip."""
    assert torch.equal(call(gated(make(), 1000)), call(make()))
    pipe, plain = gated(make(), gate), make()
    result = call(pipe)
    with hook_reference(plain, gate, **options):
        expected = call(plain)
    assert_same(result, expected)
    strip: str = tgate_compile.describe(pipe).strip
    return strip


def call(pipe: Any) -> torch.Tensor:
    result: torch.Tensor = pipe()
    return result


# Guidance that differs from the pipeline's attributes.


class Always(Looping):
    """Makes two predictions at any scale, as in pipelines with guidance below 1."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        texts = torch.cat([NO_TEXT.expand(len(latents), -1, -1), TEXTS[: len(latents)]])
        uncond, cond = self.denoised(torch.cat([latents, latents]), timestep, texts).chunk(2)
        return uncond + scale * (cond - uncond)


def test_a_scale_below_one() -> None:
    assert check(lambda: looping(Always), lambda pipe: pipe(guidance_scale=-0.5)) == "fFFppp"


class Interval(Looping):
    """Uses guidance only in some of the steps, so that its batch changes."""

    begins, ends = 0, 6

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls = 0
        return super().__call__(*args, **kwargs)

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        self.on = self.begins <= self.calls < self.ends
        self.calls += 1
        return super().guided(latents, timestep, scale if self.on else 1.0)


@pytest.mark.parametrize(
    ("begins", "ends", "gate", "strip"),
    [(0, 2, 3, "fFfppp"), (0, 4, 1, "fppppp"), (1, 5, 3, "fFFppp")],
)
def test_guidance_in_some_steps(begins: int, ends: int, gate: int, strip: str) -> None:
    kind = type("Some", (Interval,), {"begins": begins, "ends": ends})
    assert torch.equal(gated(looping(kind), 1000)(), looping(kind)())
    pipe, plain = gated(looping(kind), gate), looping(kind)
    result = pipe()
    with hook_reference(plain, gate, guided=lambda: plain.on):
        expected = plain()
    assert_same(result, expected)
    assert tgate_compile.describe(pipe).strip == strip


def test_guidance_that_begins_after_the_gate() -> None:
    kind = type("Late", (Interval,), {"begins": 4})
    with pytest.raises(tgate_compile.UnsupportedModelError, match="Guidance begins at step 4"):
        gated(looping(kind))()
    assert torch.equal(gated(looping(kind), on_unsupported="plain")(), looping(kind)())


# Pipelines derived from diffusers'.


class OwnLoop(StableDiffusionPipeline):  # type: ignore[misc]
    """Sets no attributes, as in older community pipelines; may run diffusers' own loop first."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 6,
        first: int = 0,
        generator: Any = None,
        guidance_scale: float = 5.0,
        output_type: str = "latent",
    ) -> Any:
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        if first:
            arguments = {"height": 16, "width": 16, "output_type": "latent", "latents": latents}
            latents = super().__call__(prompt, num_inference_steps=first, guidance_scale=3.0, **arguments).images
        texts = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            rows = self.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=texts).sample
            uncond, cond = rows.chunk(2)
            prediction = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput(latents, None)


def own_loop() -> Any:
    parts = stable_diffusion(layout="small").components
    pipe = OwnLoop(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_loop_that_notes_nothing() -> None:
    assert check(own_loop, run) == "FFFppp"


@pytest.mark.parametrize(("first", "second"), [(4, 6), (6, 4)])
def test_two_loops_of_different_lengths_in_a_call(first: int, second: int) -> None:
    # The first loop's attributes about its timesteps do not apply to the second.
    pipe = gated(own_loop(), 0.5)
    assert torch.equal(run(pipe, steps=second, first=first, gate_step=100), run(own_loop(), steps=second, first=first))
    run(pipe, steps=second, first=first)
    halves = [steps // 2 for steps in (first, second)]
    assert tgate_compile.describe(pipe).strip == "".join("F" * half + "p" * half for half in halves)


class InPlace(WanPipeline):  # type: ignore[misc]
    """Combines the two predictions, in place or not."""

    in_place = True

    @torch.no_grad()
    def __call__(self, prompt_embeds: Any, negative_prompt_embeds: Any, **unused: Any) -> torch.Tensor:
        self._guidance_scale = 5.0
        self.scheduler.set_timesteps(6)
        latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        for timestep in self.scheduler.timesteps:
            cond, uncond = (
                self.transformer(latents, timestep.expand(1), texts, return_dict=False)[0]
                for texts in (prompt_embeds, negative_prompt_embeds)
            )
            if self.in_place:
                cond -= uncond
                cond *= 5.0
                cond += uncond
            else:
                cond = (cond - uncond) * 5.0 + uncond
            latents = self.scheduler.step(cond, timestep, latents).prev_sample
        return latents


class OutOfPlace(InPlace):
    in_place = False


def test_predictions_combined_in_place() -> None:
    def result(kind: type) -> torch.Tensor:
        source = tiny_video.wan()
        pipe = kind(
            tokenizer=None, text_encoder=None, vae=None, scheduler=source.scheduler, transformer=source.transformer
        )
        latents: torch.Tensor = gated(pipe)(**tiny_video.wan_call())
        return latents

    assert torch.equal(result(InPlace), result(OutOfPlace))


def test_timesteps_that_are_equal_in_bfloat16() -> None:
    # Cosmos passes them between 0 and 1, and the first of many steps are equal in bfloat16.
    def image(pipe: Any) -> torch.Tensor:
        pipe.transformer.to(torch.bfloat16)
        arguments = {
            name: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in tiny_video.cosmos_2_call().items()
        }
        generator = torch.Generator().manual_seed(0)
        images: torch.Tensor = pipe(
            **arguments, num_inference_steps=36, output_type="latent", generator=generator
        ).images
        return images

    pipe = gated(tiny_video.cosmos_2(), 34)
    assert_differ(image(pipe), image(tiny_video.cosmos_2()))
    assert tgate_compile.describe(pipe).strip == "F" * 34 + "pp"


# Custom schedulers.


class OtherNames(DDIMScheduler):  # type: ignore[misc]
    def step(self, noise: torch.Tensor, t: Any, x_t: torch.Tensor) -> Any:
        return super().step(noise, t, x_t)


class Wrapper:
    """Forwards everything to another scheduler."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


class Composed(Looping):
    """Combines three prompts for one image."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        rows = self.denoised(latents.repeat(4, 1, 1, 1), timestep, torch.cat([NO_TEXT, TEXTS[:3]]))
        return rows[:1] + scale * (rows[1:].mean(0, keepdim=True) - rows[:1])


def wrapped(pipeline: type[Looping]) -> Any:
    pipe = looping(pipeline)
    pipe.scheduler = Wrapper(pipe.scheduler)
    return pipe


@pytest.mark.parametrize(
    "make", [lambda pipeline: looping(pipeline, OtherNames(**VELOCITY)), wrapped], ids=["names", "wrapper"]
)
def test_steps_of_other_schedulers_are_seen(make: Callable[[type[Looping]], Any]) -> None:
    assert check(lambda: make(Looping), lambda pipe: pipe(images=2)) == "FFFppp"
    with pytest.raises(tgate_compile.UnsupportedModelError, match="4 times the 1 latents"):
        gated(make(Composed))()


def test_a_callback_that_replaces_the_scheduler() -> None:
    def replacing(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            other = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            other.set_timesteps(6)
            pipe.scheduler = other
        return tensors

    def image(pipe: Any) -> torch.Tensor:
        latents: torch.Tensor = run(pipe, callback_on_step_end=replacing)
        return latents

    assert check(lambda: stable_diffusion(layout="small"), image) == "FFFppp"


def test_copies_of_the_scheduler_are_with_private_class() -> None:
    copies: list[Any] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        copies.append(copy.deepcopy(pipe.scheduler))
        return tensors

    run(gated(stable_diffusion(layout="small")), callback_on_step_end=keep)
    assert {type(each) for each in copies} == {DDIMScheduler}
    assert copies[0].config == pickle.loads(pickle.dumps(copies[0])).config


# Custom solvers, which call the denoiser between the scheduler's timesteps.


class Midpoint(Looping):
    """Visits half of the scheduler's timesteps, with a second evaluation at another timestep."""

    def timesteps(self) -> Iterator[Any]:
        yield from self.scheduler.timesteps[::2]

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        first = super().guided(latents, timestep, scale)
        return super().guided(latents - 0.1 * first, timestep - 5, scale)


class Scaled(Midpoint):
    """The same with timesteps in other units."""

    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        return super().denoised(latents, timestep / 1000, texts)


@pytest.mark.parametrize("pipeline", [Midpoint, Scaled])
def test_midpoints(pipeline: type[Looping]) -> None:
    with pytest.raises(tgate_compile.UnsupportedModelError, match="other timesteps between two steps"):
        gated(looping(pipeline))()
    assert torch.equal(gated(looping(pipeline), on_unsupported="plain")(), looping(pipeline)())


# Calls that turn out in the middle to be unsupported, and are repeated in full.


class LaterComposed(Composed):
    """Composes its prompts in the last two steps. The user sets the timesteps and the latents."""

    in_place = False

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for number, timestep in enumerate(self.scheduler.timesteps):
            guided = super().guided if number > 3 else functools.partial(Looping.guided, self)
            stepped = self.stepped(guided(latents, timestep, 5.0), timestep, latents)
            latents = latents.copy_(stepped) if self.in_place else stepped
        return latents


class LaterInPlace(LaterComposed):
    in_place = True


def later(pipeline: type[Looping], **options: Any) -> torch.Tensor:
    pipe = looping(pipeline, DPMSolverMultistepScheduler(prediction_type="v_prediction"))
    if options:
        gated(pipe, **options)
    pipe.scheduler.set_timesteps(6)
    latents: torch.Tensor = pipe(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    return latents


def test_a_call_that_is_repeated_finds_its_scheduler_as_it_was() -> None:
    assert torch.equal(later(LaterComposed, on_unsupported="plain"), later(LaterComposed))


def test_a_call_that_has_changed_its_arguments_is_not_repeated() -> None:
    with pytest.raises(tgate_compile.UnsupportedModelError, match="4 times the 1 latents"):
        later(LaterInPlace, on_unsupported="plain")


# Other kinds of calls.


class Numbers(Looping):
    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        return super().denoised(latents, int(timestep), texts)


def test_timesteps_that_are_numbers_need_no_graphs_of_their_own() -> None:
    assert check(lambda: looping(Numbers), call) == "FFFppp"
    pipe = gated(looping(Numbers))
    pipe()
    pipe(num_inference_steps=9)
    assert pipe._tgate_compile.hook.store.compilations == 2


class ByGradient(Looping):
    """Uses the gradient of a loss as guidance, both through the denoiser and outside of it."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            prediction = super().guided(latents, timestep, scale)
            loss = (latents - 0.5 * prediction).square().sum()
            return prediction.detach() - 0.01 * torch.autograd.grad(loss, latents)[0]


def test_gradients_through_the_denoiser() -> None:
    with pytest.raises(tgate_compile.UnsupportedModelError, match="'sample' of the denoiser's call requires gradients"):
        gated(looping(ByGradient))()
    assert torch.equal(gated(looping(ByGradient), on_unsupported="plain")(), looping(ByGradient)())


def test_gradients_in_a_callback() -> None:
    def descend(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.enable_grad():
            latents = tensors["latents"].detach().requires_grad_()
            loss = pipe.unet(latents, timestep, encoder_hidden_states=TEXTS[:1]).sample.square().sum()
            return {"latents": latents.detach() - 0.01 * torch.autograd.grad(loss, latents)[0]}

    def image(pipe: Any) -> torch.Tensor:
        latents: torch.Tensor = run(pipe, callback_on_step_end=descend)
        return latents

    make = stable_diffusion
    assert torch.equal(image(gated(make(layout="small"), 1000)), image(make(layout="small")))


def test_a_callback_that_runs_another_pipeline_over_the_same_denoiser() -> None:
    def images(*, optimized: bool) -> torch.Tensor:
        pipe = stable_diffusion(layout="small")
        parts = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
        preview = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        preview.set_progress_bar_config(disable=True)
        if optimized:
            gated(pipe, 1000)
            gated(preview, 1000)
        seen = []

        def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 2:
                seen.append(run(preview, steps=2))
            return tensors

        return torch.cat([run(pipe, callback_on_step_end=look), *seen])

    assert torch.equal(images(optimized=True), images(optimized=False))


class Regions(AttnProcessor2_0):  # type: ignore[misc]
    """Attention with an argument about the image's regions, which has no batch dimension."""

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, regions: Any = None, **kwargs: Any) -> Any:
        result = super().__call__(attn, x, encoder_hidden_states, **kwargs)
        return result * (1 + regions.sum()) if encoder_hidden_states is None else result


def test_arguments_of_attention_with_as_many_rows_as_the_batch() -> None:
    def image(regions: torch.Tensor) -> torch.Tensor:
        pipe = stable_diffusion(layout="small")
        pipe.unet.set_attn_processor({name: Regions() for name in pipe.unet.attn_processors})
        latents: torch.Tensor = run(gated(pipe), cross_attention_kwargs={"regions": regions})
        return latents

    assert_same(image(torch.tensor([0.1, 0.4])), image(torch.tensor([0.1, 0.3, 0.1])))


# Calls without a loop.


class Yielding(Looping):
    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:  # type: ignore[override]
        yield super().__call__(*args, **kwargs)


class WithGateStep(Looping):
    def __call__(self, gate_step: int = 3) -> torch.Tensor:  # type: ignore[override]
        return super().__call__()


class InParts(Looping):
    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unet.conv_out(self.unet.conv_in(latents))
        return result


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        (Yielding, "returns before its first step"),
        (WithGateStep, "already has an argument gate_step"),
        (InParts, "The unet of this InParts was not called"),
    ],
)
def test_true_reasons(pipeline: type[Looping], reason: str) -> None:
    with pytest.raises(tgate_compile.TGateError, match=reason):
        gated(looping(pipeline))()


class Sampled(Looping):
    """Takes its loop as a function in the call."""

    @torch.no_grad()
    def __call__(self, sampler: Callable[..., torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        self.scheduler.set_timesteps(6)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return sampler(lambda x, t: self.guided(x, t, 5.0), latents, self.scheduler.timesteps)


def test_a_sampler_among_the_arguments_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    def sampler(denoised: Any, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        for timestep in timesteps:
            latents = latents - 0.1 * denoised(latents, timestep)
        return latents

    assert torch.equal(gated(looping(Sampled))(sampler), looping(Sampled)(sampler))
    assert "Nothing was gated" in caplog.text


# Loops that change the denoiser.


class Switching(Looping):
    """Disables its LoRA after two steps."""

    def timesteps(self) -> Iterator[Any]:
        self.unet.enable_adapters()
        for number, timestep in enumerate(self.scheduler.timesteps):
            if number == 2:
                self.unet.disable_adapters()
            yield timestep


def by_pipeline() -> Any:
    pipe = looping(Switching)
    add_lora(pipe.unet)
    return pipe


def by_hook() -> Any:
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)
    calls: list[int] = []

    def switch(module: Any, args: Any) -> None:
        calls.append(0)
        module.set_adapters(["default"], [1.0 if len(calls) < 3 else 0.3])

    pipe.unet.register_forward_pre_hook(switch)
    return pipe


def by_scheduler() -> Any:
    pipe = stable_diffusion(layout="small")
    add_lora(pipe.unet)

    class Switch(DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            pipe.unet.set_adapters(["default"], [0.3])
            return super().step(*args, **kwargs)

    pipe.scheduler = Switch.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("make", [by_pipeline, by_hook, by_scheduler])
def test_denoisers_that_change_on_the_way(make: Callable[[], Any]) -> None:
    def image(pipe: Any) -> torch.Tensor:
        latents: torch.Tensor = pipe() if isinstance(pipe, Looping) else run(pipe)
        return latents

    assert torch.equal(image(gated(make(), 1000)), image(make()))
