"""`on_unsupported="plain"`: calls that cannot be gated run in full, bitwise as in the plain pipeline, and warn."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

import tgate_compile
from tests.comparing import assert_differ
from tests.own_loops import NO_TEXT, TEXTS, Looping, looping
from tests.tiny_pipelines import image, run, stable_diffusion
from tests.tiny_transformers import stable_diffusion_3
from tgate_compile import CaptureError, ConfigurationError, UnsupportedModelError

GATE = 3
SEEN: list[Any] = []


def small(name: str = "StableDiffusionPipeline", **unet: Any) -> Any:
    return stable_diffusion(name, layout="small", **unet)


def served(pipe: Any, **options: Any) -> Any:
    return tgate_compile.optimize(pipe, **{"gate_step": GATE, "backend": "eager", "on_unsupported": "plain", **options})


def collect(module: Any, args: Any, output: Any) -> Any:
    SEEN.append(output.shape)
    return output * 0.9


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("tgate_compile")]


# Pipelines whose calls can never be gated.


def refused_class() -> tuple[Any, dict[str, Any]]:
    pipe = small("StableDiffusionInstructPix2PixPipeline", in_channels=8)
    return pipe, {"image": image(), "guidance_scale": 5.0, "image_guidance_scale": 1.5}


def foreign_code() -> tuple[Any, dict[str, Any]]:
    pipe = small()
    pipe.unet.mid_block.register_forward_hook(collect)
    return pipe, {}


def perturbed_attention() -> tuple[Any, dict[str, Any]]:
    return small("StableDiffusionPAGPipeline"), {"pag_scale": 2.0}


class Branching(diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """Cannot be captured."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(sample if sample.mean() > 100 else sample * 0.9, *args, **kwargs)


def capture_failure() -> tuple[Any, dict[str, Any]]:
    pipe = small()
    pipe.unet.__class__ = Branching
    return pipe, {}


CAUSES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], type[Exception], str]] = {
    "class": (refused_class, UnsupportedModelError, "three"),
    "foreign code": (foreign_code, UnsupportedModelError, "'SEEN', a list"),
    "perturbed attention": (perturbed_attention, UnsupportedModelError, "perturbed guidance"),
    "capture": (capture_failure, CaptureError, "Could not capture Branching"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_pipelines(cause: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    make, error, reason = CAUSES[cause]
    plain, call = make()
    expected, other = run(plain, **call), run(plain, **call, seed=1)
    with pytest.raises(error, match=reason):
        run(tgate_compile.optimize(make()[0], GATE, backend="eager"), **call)
    pipe = served(make()[0])
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        assert torch.equal(run(pipe, **call), expected)
        assert torch.equal(run(pipe, gate_step=2, **call), expected)
        with monkeypatch.context() as patch:
            if cause == "capture":  # a failed capture is not tried again
                patch.setattr(torch.export, "export", None)
            assert torch.equal(run(pipe, **call), expected)
        assert torch.equal(run(pipe, **call, seed=1), other)
    (message,) = warnings(caplog)
    assert message.startswith(f"This call of {type(plain).__name__} runs in full, since it cannot be gated. ")
    assert reason in message
    description = tgate_compile.describe(pipe)
    assert (description.strip, description.last_steps, description.cache_bytes) == ("", (), 0)
    assert reason in str(description.plain_because)
    assert f"\nruns in full: {description.plain_because}" in str(description)
    # Describing the call beforehand runs no step.
    beforehand = tgate_compile.describe(pipe, prompt="red cat", num_inference_steps=6, **call)
    assert (beforehand.strip, beforehand.plain_because) == ("", description.plain_because)
    with pytest.raises(ConfigurationError, match="gate_step"):
        run(pipe, gate_step=0, **call)
    tgate_compile.restore(pipe)
    assert type(pipe) is type(plain)
    assert torch.equal(run(pipe, **call), expected)


def test_joint_attention() -> None:
    pipe = stable_diffusion_3()
    call = {
        "prompt_embeds": TEXTS[:1],
        "negative_prompt_embeds": NO_TEXT,
        "pooled_prompt_embeds": TEXTS[:1, 0],
        "negative_pooled_prompt_embeds": NO_TEXT[:, 0],
        "height": 64,
        "width": 64,
        "steps": 4,
    }
    expected = run(pipe, **call)
    tgate_compile.optimize(pipe, 2, sp_interval=2, backend="eager", on_unsupported="plain")
    assert torch.equal(run(pipe, **call), expected)
    assert "oint attention" in str(tgate_compile.describe(pipe).plain_because)


# Causes that appear only during a call.


class Composed(Looping):
    """Makes three predictions for each image."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        rows = self.denoised(latents.repeat(3, 1, 1, 1), timestep, torch.cat([NO_TEXT, TEXTS[:2]]))
        return rows[:1] + scale * (rows[1:2] - rows[:1]) + scale * (rows[2:] - rows[:1])


class InCalls(Looping):
    """Makes a separate call for each half, in an unknown order."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        uncond, cond = (self.denoised(latents, timestep, text) for text in (NO_TEXT, TEXTS[:1]))
        return uncond + scale * (cond - uncond)


class BeyondTheTimesteps(Looping):
    """Continues after the last timestep."""

    def timesteps(self) -> Iterator[Any]:
        yield from self.scheduler.timesteps
        yield torch.tensor(0)

    def stepped(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        if timestep == 0:
            return latents - 0.1 * prediction
        return super().stepped(prediction, timestep, latents)


class GuidedLate(Looping):
    """Turns guidance on in the middle."""

    do_classifier_free_guidance = property(lambda self: self.late)

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        self.late = bool(timestep < 500)
        return super().guided(latents, timestep, scale if self.late else 1.0)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.late = False
        return super().__call__(*args, **kwargs)


class NoisyAtTheStart(Looping):
    """Draws its latents from the given generator, or from the global one."""

    extra = 1

    @torch.no_grad()
    def __call__(self, generator: Any = None, numbers: Any = None, fail: bool = True) -> torch.Tensor:  # type: ignore[override]
        generators = generator if isinstance(generator, list) else [generator]
        latents = torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generators])
        self.scheduler.set_timesteps(6)
        for timestep in [*self.scheduler.timesteps, *[torch.tensor(0)] * (self.extra if fail else 0)]:
            prediction = self.guided(latents, timestep, 5.0)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample if timestep else latents
            latents = latents + 0.01 * torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generators])
        return latents


@pytest.mark.parametrize(
    ("pipeline", "options", "reason"),
    [
        (Composed, {}, "3 times the 1 latents"),
        (InCalls, {}, "twice for one timestep"),
        (BeyondTheTimesteps, {}, "more timesteps than the 6"),
        (GuidedLate, {"gate_step": 5, "sp_interval": 3, "warm_up": 1}, "Guidance has been switched on in the middle"),
    ],
)
def test_calls(pipeline: type[Looping], options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = looping(pipeline)()
    with pytest.raises(UnsupportedModelError, match=reason):
        served(looping(pipeline), **options, on_unsupported="error")()
    pipe = served(looping(pipeline), **options)
    with caplog.at_level(logging.WARNING, "tgate_compile"):
        for _ in range(2):
            assert torch.equal(pipe(), expected)
    (message,) = warnings(caplog)
    assert reason in message
    assert tgate_compile.describe(pipe).strip == ""
    tgate_compile.restore(pipe)
    assert torch.equal(pipe(), expected)


def test_a_good_call_after_a_bad_one() -> None:
    gated = tgate_compile.optimize(looping(NoisyAtTheStart), GATE, backend="eager")
    pipe = served(looping(NoisyAtTheStart))

    def call(pipe: Any, *, fail: bool) -> torch.Tensor:
        result: torch.Tensor = pipe(torch.Generator().manual_seed(0), fail=fail)
        return result

    good, plain = call(gated, fail=False), call(looping(NoisyAtTheStart), fail=True)
    for _ in range(2):
        assert torch.equal(call(pipe, fail=True), plain)
        assert tgate_compile.describe(pipe).plain_because is not None
        assert torch.equal(call(pipe, fail=False), good)
        assert tgate_compile.describe(pipe).plain_because is None
        assert tgate_compile.describe(pipe).strip == "fFFppp"  # the first step shows that there are halves


@pytest.mark.parametrize("random", ["generator", "list", "global"])
def test_random_numbers_are_drawn_again(random: str) -> None:
    def call(pipe: Any) -> tuple[torch.Tensor, float]:
        torch.manual_seed(3)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        given = {"generator": generators[0], "list": generators, "global": None}[random]
        result = pipe(given)
        # The generators are left in the same state as by the plain call.
        return result, torch.rand(1, generator=None if random == "global" else generators[0]).item()

    with torch.random.fork_rng():
        result, after = call(served(looping(NoisyAtTheStart)))
        expected, expected_after = call(looping(NoisyAtTheStart))
    assert torch.equal(result, expected)
    assert after == expected_after


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_hook_that_a_callback_puts_on(at: int) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == at:
            pipe.unet.mid_block.register_forward_hook(collect)
        return tensors

    gated, plain = served(small()), small()
    unhooked = run(plain)
    expected = run(plain, callback_on_step_end=callback)
    SEEN.clear()
    assert torch.equal(run(gated, callback_on_step_end=callback), expected)
    # In the end the hook is registered once, as in the plain pipeline.
    assert len(SEEN) == 5 - at
    assert len(gated.unet.mid_block._forward_hooks) == 1
    assert_differ(expected, unhooked)
    assert tgate_compile.describe(gated).strip == ""
    gated.unet.mid_block._forward_hooks.clear()
    run(gated)
    assert tgate_compile.describe(gated).strip == "FFFppp"


def test_the_old_callback_and_a_processor_that_it_changes() -> None:
    class Mine(diffusers.models.attention_processor.AttnProcessor):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            SEEN.append(None)
            return super().__call__(*args, **kwargs) * 0.1

    def call(pipe: Any) -> torch.Tensor:
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        before = attention.processor

        def callback(step: int, timestep: Any, latents: Any) -> None:
            if step == 4:
                attention.set_processor(Mine())

        with pytest.warns(FutureWarning, match="callback"):
            result = run(pipe, callback=callback, callback_steps=1)
        attention.set_processor(before)
        return result

    plain = small()
    expected = call(plain)
    assert_differ(expected, run(plain))
    assert torch.equal(call(served(small())), expected)


# Custom loops cannot be repeated.


@contextmanager
def hook_from(pipe: Any, step: int) -> Iterator[Callable[[int], None]]:
    handles = []

    def put(now: int) -> None:
        if now == step:
            handles.append(pipe.unet.mid_block.register_forward_hook(collect))

    yield put
    for handle in handles:
        handle.remove()


@torch.no_grad()
def own_loop(pipe: Any, put: Callable[[int], None]) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        put(step)
        text = torch.cat([NO_TEXT, TEXTS[:1]])
        uncond, cond = pipe.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=text).sample.chunk(2)
        latents = pipe.scheduler.step(uncond + 5 * (cond - uncond), timestep, latents).prev_sample
    return latents


def test_loops_of_ones_own() -> None:
    pipe, plain = served(small()), small()
    for step in (0, 2):
        with hook_from(plain, step) as put:
            expected = own_loop(plain, put)
        with hook_from(pipe, step) as put, tgate_compile.generation(pipe, guidance=True):
            assert torch.equal(own_loop(pipe, put), expected)
        assert tgate_compile.describe(pipe).plain_because is not None
    with (
        pytest.raises(UnsupportedModelError, match="'SEEN', a list"),
        hook_from(pipe, 4) as put,
        tgate_compile.generation(pipe, guidance=True),
    ):
        own_loop(pipe, put)


# The option itself.


def test_an_error_is_the_default() -> None:
    assert inspect.signature(tgate_compile.optimize).parameters["on_unsupported"].default == "error"


@pytest.mark.parametrize("given", ["Plain", "", None, True, "warn", ["plain"]])
def test_wrong_values(given: Any) -> None:
    pipe = small()
    with pytest.raises(ConfigurationError, match=r'on_unsupported must be "error" or "plain", but got'):
        tgate_compile.optimize(pipe, GATE, backend="eager", on_unsupported=given)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert tgate_compile.optimize(pipe, GATE, backend="eager") is pipe


@pytest.mark.parametrize("wrong", [{"gate_step": 0}, {"backend": "none"}, {"sites": ["nothing.*"]}])
def test_wrong_arguments_stay_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        served(small(), **wrong)
