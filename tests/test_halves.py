"""Whether a batch has both guidance halves, and in which order, is detected and not guessed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, SemanticStableDiffusionPipeline, StableDiffusionXLPipeline

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import OneCall, played
from tests.own_loops import NO_TEXT, TEXTS, Looping, looping
from tests.tiny_pipelines import PROMPTS, VELOCITY, run, sdxl, stable_diffusion
from tgate_compile.engine.halves import latents_of

GATE = 3


def gated(pipe: Any, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, **{"gate_step": GATE, "backend": "eager", **options})


def by_hooks(
    pipe: Any, gate: int = GATE, *, guided: bool = True, kept: int = 0, cached: bool = True, **call: Any
) -> Any:
    sites = [name for name, _ in pipe.unet.named_modules() if cached and name.endswith("attn2")]
    reference = OneCall(pipe.unet, gate, guided=guided, halved=("sample", "encoder_hidden_states"), kept=kept)
    with played(reference, pipe.unet, sites):
        return pipe(**call)


# More predictions than two.


def semantic() -> Any:
    parts = stable_diffusion(layout="small").components
    del parts["image_encoder"]
    parts["scheduler"] = DDIMScheduler(**VELOCITY, clip_sample=False)
    pipe = SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edits(*prompts: str) -> dict[str, Any]:
    return {
        "editing_prompt": list(prompts),
        "reverse_editing_direction": [False] * len(prompts),
        "edit_warmup_steps": 1,
        "edit_guidance_scale": 5.0,
        "edit_threshold": 0.5,
    }


@pytest.mark.parametrize("number", [1, 2])
def test_semantic_guidance(number: int) -> None:
    call = edits(*["smile", "hat"][:number])
    plain = run(semantic(), **call)
    pipe = gated(semantic(), on_unsupported="plain")
    assert torch.equal(run(pipe, **call), plain)
    # Without edits the batch is [uncond; cond], and the gate acts.
    assert_differ(run(pipe), run(semantic()))
    assert tgate_compile.describe(pipe).strip == "FFFppp"
    refusing = gated(semantic())
    with pytest.raises(tgate_compile.UnsupportedModelError, match=f"batch of {number + 2} is {number + 2} times the 1"):
        run(refusing, **call)


class Composed(Looping):
    """Several prompts for each image, with separate predictions and weights."""

    prompts = 3

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        texts = torch.cat([NO_TEXT, TEXTS[: self.prompts]])
        rows = self.denoised(latents.repeat(len(texts), 1, 1, 1), timestep, texts)
        return rows[:1] + scale * sum(row - rows[:1] for row in rows[1:, None]) / self.prompts


class ComposedOfTwo(Composed):
    prompts = 2


class WithoutStep(Composed):
    """The same with a custom update instead of the scheduler's."""

    def stepped(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        return latents - 0.1 * prediction


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        (Composed, "batch of 4 is 4 times the 1 latents"),
        (ComposedOfTwo, "batch of 3 is 3 times the 1 latents"),
        (WithoutStep, "batch of 4 may be the two halves of guidance or 4 images"),
    ],
)
def test_composed_prompts(pipeline: type[Looping], reason: str) -> None:
    for gate in (1, GATE):
        pipe = gated(looping(pipeline), gate_step=gate)
        with pytest.raises(tgate_compile.UnsupportedModelError, match=reason):
            pipe()
    served = gated(looping(pipeline), on_unsupported="plain")
    assert torch.equal(served(), looping(pipeline)())


# Several images without guidance in spite of a guidance scale.


class Embedded(Looping):
    """The scale does not mean guidance: one prediction for each image, as in models with distilled guidance."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        return self.denoised(latents, timestep, TEXTS[: len(latents)] * scale)


class EmbeddedTwins(Embedded):
    """The same for two images that start from equal noise: their batch looks like two halves."""

    def timesteps(self) -> Any:
        yield from self.scheduler.timesteps

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        return super().guided(latents[:1].repeat(2, 1, 1, 1) if len(latents) == 2 else latents, timestep, scale)


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("gate", [1, GATE])
def test_images_without_halves(images: int, gate: int) -> None:
    pipe = gated(looping(Embedded), gate_step=gate)
    assert_same(pipe(images=images), by_hooks(looping(Embedded), gate, guided=False, images=images))
    assert tgate_compile.describe(pipe).strip.lower() == "f" * gate + "p" * (6 - gate)


def test_two_equal_images_without_halves() -> None:
    # The scheduler's first step shows that there are two latents, not one in two halves.
    pipe = gated(looping(EmbeddedTwins))
    assert_same(pipe(images=2), by_hooks(looping(EmbeddedTwins), guided=False, images=2))
    # With the gate at the first step they are already merged by then.
    with pytest.raises(tgate_compile.UnsupportedModelError, match="two halves were expected"):
        gated(looping(EmbeddedTwins), gate_step=1)(images=2)


# Guidance without an attribute for it.


class Unspoken(Looping):
    """Has no `guidance_scale`, and no property for whether guidance is on."""

    @torch.no_grad()
    def __call__(self, images: int = 1, strength_of_text: float = 5.0) -> torch.Tensor:  # type: ignore[override]
        return super().__call__(images, guidance_scale=strength_of_text)


@pytest.mark.parametrize("gate", [1, GATE])
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_that_only_the_batch_shows(gate: int, images: int) -> None:
    pipe = gated(looping(Unspoken), gate_step=gate)
    assert_same(pipe(images=images), by_hooks(looping(Unspoken), gate, images=images))
    pipe = gated(looping(Unspoken), gate_step=gate)
    unguided = pipe(images=images, strength_of_text=1.0)
    assert_same(unguided, by_hooks(looping(Unspoken), gate, guided=False, images=images, strength_of_text=1.0))


# The order of the halves.


class PromptFirst(Looping):
    """The batch is [cond; uncond]."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        texts = torch.cat([TEXTS[: len(latents)], NO_TEXT.expand(len(latents), -1, -1)])
        cond, uncond = self.denoised(torch.cat([latents, latents]), timestep, texts).chunk(2)
        return uncond + scale * (cond - uncond)


class Rescaled(PromptFirst):
    """The same with guidance rescale."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        prediction = super().guided(latents, timestep, scale)
        return 0.7 * prediction / prediction.std() + 0.3 * prediction


@pytest.mark.parametrize("pipeline", [Looping, PromptFirst, Rescaled])
@pytest.mark.parametrize("keep", ["uncond", "cond"])
def test_which_half_is_the_prompts(pipeline: type[Looping], keep: str) -> None:
    first_is_cond = pipeline is not Looping
    kept = int((keep == "cond") != first_is_cond)
    # Without caches the text of the remaining half still matters.
    expected = by_hooks(looping(pipeline), kept=kept, cached=False, images=2)
    assert_differ(expected, by_hooks(looping(pipeline), kept=1 - kept, cached=False, images=2))
    assert_same(gated(looping(pipeline), gate_step=None, guidance_step=GATE, keep=keep)(images=2), expected)


def test_the_order_matters_to_an_anchor() -> None:
    with pytest.raises(tgate_compile.UnsupportedModelError, match="anchor_weight"):
        gated(looping(PromptFirst), anchor_weight=1.0)()


# Sizes whose rows alternate between the halves.


def sizes(pipe: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPTS,
        "height": 16,
        "width": 16,
        "original_size": (16, 16),
        "negative_original_size": (64, 64),
        "negative_target_size": (8, 8),
    }


class Mine(StableDiffusionXLPipeline):  # type: ignore[misc]
    pass


class HalvesFirst(StableDiffusionXLPipeline):  # type: ignore[misc]
    """Repeats the sizes for the images before it concatenates the halves, as SDXL's image-to-image pipeline does."""

    def _get_add_time_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = super()._get_add_time_ids(*args, **kwargs)
        return ids.repeat(len(PROMPTS), 1)


def test_alternating_sizes_of_a_subclass() -> None:
    def make(pipeline: type) -> Any:
        pipe = pipeline(**sdxl().components, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    base = run(gated(make(StableDiffusionXLPipeline)), **sizes(None))
    assert_same(run(gated(make(Mine)), **sizes(None)), base)


def test_layouts_are_found_in_the_rows() -> None:
    from tgate_compile.engine.call import Call
    from tgate_compile.engine.families import Family
    from tgate_compile.engine.halves import alternating, one_half

    def call(*rows: int) -> Call:
        ids = torch.tensor(rows).float()[:, None].expand(-1, 6)
        return Call.of((torch.zeros(len(rows), 4),), {"added_cond_kwargs": {"time_ids": ids}})

    xl = Family(interleaved=(("added_cond_kwargs", "time_ids"),))
    for family in (Family(), xl):
        assert one_half(call(1, 2, 1, 2), 4, "uncond", family).leaves[1][:, 0].tolist() == [1, 1]
        assert one_half(call(1, 1, 2, 2), 4, "uncond", family).leaves[1][:, 0].tolist() == [1, 1]
        assert one_half(call(1, 1, 2, 2), 4, "cond", family).leaves[1][:, 0].tolist() == [2, 2]
    # Equal rows show nothing, and do not matter; for sizes without a pattern the family decides.
    assert not alternating(call(1, 1, 1, 1), 4, Family())
    assert one_half(call(1, 2, 3, 4), 4, "uncond", Family()).leaves[1][:, 0].tolist() == [1, 2]
    assert one_half(call(1, 2, 3, 4), 4, "uncond", xl).leaves[1][:, 0].tolist() == [1, 3]


def test_a_plain_call_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = gated(looping(Composed), on_unsupported="plain")
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        for _ in range(3):
            pipe()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "runs in full" in messages[0]
    assert "4 times" in messages[0]


# Guidance that is switched on and off.


class Switched(Looping):
    """Guidance is on only in some of the steps, as the pipeline's property reports."""

    steps_with_guidance: tuple[int, ...] = ()
    index = 0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.index in self.steps_with_guidance

    def timesteps(self) -> Any:
        for index, timestep in enumerate(self.scheduler.timesteps):
            self.index = index
            yield timestep

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        return super().guided(latents, timestep, scale if self.do_classifier_free_guidance else 1.0)


@pytest.mark.parametrize("steps", [(0, 1, 2, 3, 4, 5), (0, 1), (1, 2, 3, 4, 5), (0, 2, 3, 4, 5), ()])
def test_guidance_that_goes_and_comes(steps: tuple[int, ...]) -> None:
    def make() -> Any:
        pipe = looping(Switched)
        pipe.steps_with_guidance = steps
        return pipe

    ungated = gated(make(), gate_step=1000)
    assert torch.equal(ungated(images=2), make()(images=2))
    if 2 in steps:  # it is on at the step before the gate
        sites = [name for name, _ in make().unet.named_modules() if name.endswith("attn2")]
        plain = make()
        reference = OneCall(plain.unet, GATE, halved=("sample", "encoder_hidden_states"))
        reference.attention = lambda name, output: _merged(reference, name, output, plain)  # type: ignore[method-assign]
        with played(reference, plain.unet, sites):
            expected = plain(images=2)
        assert_same(gated(make())(images=2), expected)


def _merged(reference: OneCall, name: str, output: torch.Tensor, pipe: Any) -> torch.Tensor:
    """Return the value that a cross-attention passes on if guidance may be off in steps before the gate."""
    if reference.step >= reference.gate:
        return reference.caches[name]
    reference.caches[name] = sum(output.chunk(2)) / 2 if pipe.do_classifier_free_guidance else output
    return output


def test_guidance_that_comes_after_the_gate_is_an_error() -> None:
    pipe = looping(Switched)
    pipe.steps_with_guidance = (4, 5)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with pytest.raises(tgate_compile.ConfigurationError, match="it would never act"):
        pipe(images=2)


@pytest.mark.parametrize("name", ["position_ids", "img_ids", "video_coords", "image_rotary_emb"])
def test_positions_are_not_the_latents(name: str) -> None:
    """Cosmos 3 has positions with fractions, whose number depends on the length of the text, before its latents."""
    latents = torch.zeros(1, 4, 8, 8)
    assert latents_of({name: torch.zeros(3, 27), "vision_tokens": [latents]}) is latents
