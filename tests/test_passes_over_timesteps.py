"""A generation is one pass over the timesteps. A call may make several, and each starts over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

import tgate_compile
from tests import tiny_video
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import OneCall, played
from tests.own_loops import Looping, looping
from tests.tiny_pipelines import VELOCITY

GATE = 3


class Restarting(OneCall):
    """T-GATE by plain hooks that starts over at each denoiser call in `starts`."""

    def __init__(self, denoiser: torch.nn.Module, gate: int, starts: list[int], **options: Any) -> None:
        super().__init__(denoiser, gate, **options)
        self.starts = starts
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls in self.starts:
            self.step = -1
        self.calls += 1
        return super().forward(*args, **kwargs)


def check(make: Any, starts: list[int], strip: str, rows: tuple[str, ...] = (), **call: Any) -> None:
    """Check the gated pipeline against hooks that start over at these denoiser calls."""
    gated, plain = tgate_compile.optimize(make(), GATE, backend="eager"), make()
    result = gated(**call)
    assert tgate_compile.describe(gated).strip == strip
    sites = gated._tgate_compile.hook.store.site_names
    reference = Restarting(plain.unet, GATE, starts, halved=("sample", "encoder_hidden_states", *rows))
    with played(reference, plain.unet, sites):
        expected = plain(**call)
    assert_same(*(one if torch.is_tensor(one) else one.frames for one in (result, expected)))
    ungated = gated(gate_step=1000, **call)
    again = make()(**call)
    assert torch.equal(*(one if torch.is_tensor(one) else one.frames for one in (ungated, again)))


@pytest.mark.parametrize("fast", [False, True])
def test_freeinit(fast: bool) -> None:
    def make() -> Any:
        pipe = tiny_video.animatediff()
        pipe.enable_free_init(num_iters=3, use_fast_sampling=fast)
        return pipe

    def call() -> dict[str, Any]:
        return {**tiny_video.animatediff_call(1), "num_inference_steps": 6, "output_type": "latent"}

    gated, plain = tgate_compile.optimize(make(), GATE, backend="eager"), make()
    result = gated(**call(), generator=torch.Generator().manual_seed(0)).frames
    # Fast sampling turns the steps into 2, 4 and 6.
    starts, strip = ([0, 2, 6], "FFFFFpFFFppp") if fast else ([0, 6, 12], "FFFppp" * 3)
    assert tgate_compile.describe(gated).strip == strip
    sites = gated._tgate_compile.hook.store.site_names
    reference = Restarting(plain.unet, GATE, starts, halved=("sample", "encoder_hidden_states"))
    with played(reference, plain.unet, sites):
        expected = plain(**call(), generator=torch.Generator().manual_seed(0)).frames
    assert_same(result, expected)


class OneAfterTheOther(Looping):
    """Denoises its images one by one, but sets the timesteps only once."""

    @torch.no_grad()
    def __call__(self, images: int = 2, num_inference_steps: int = 6, guidance_scale: float = 5.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        self.scheduler.set_timesteps(num_inference_steps)
        results = []
        for _ in range(images):
            latents = torch.randn(1, 4, 8, 8, generator=generator)
            for timestep in self.timesteps():
                prediction = self.guided(latents, timestep, guidance_scale)
                latents = self.stepped(prediction, timestep, latents)
            results.append(latents)
        return torch.cat(results)


class SetAgain(OneAfterTheOther):
    """Sets the timesteps for each image."""

    def timesteps(self) -> Iterator[Any]:
        self.scheduler.set_timesteps(6)
        yield from self.scheduler.timesteps


class Computed(OneAfterTheOther):
    """Passes its own timesteps to the denoiser instead of the scheduler's tensors."""

    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        return super().denoised(latents, torch.tensor([int(timestep)] * len(latents)), texts)


class Numbers(OneAfterTheOther):
    """Passes Python numbers."""

    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        return super().denoised(latents, int(timestep), texts)


class Expanded(OneAfterTheOther):
    """Passes a timestep for each row."""

    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        return super().denoised(latents, timestep.expand(len(latents)), texts)


@pytest.mark.parametrize("pipeline", [OneAfterTheOther, SetAgain, Computed, Numbers, Expanded])
def test_images_one_after_the_other(pipeline: type[Looping]) -> None:
    rows = ("timestep",) if pipeline in (Computed, Expanded) else ()
    check(lambda: looping(pipeline), [0, 6], "FFFpppFFFppp", rows)


def test_a_fraction_follows_each_pass() -> None:
    gated = tgate_compile.optimize(looping(SetAgain), 0.5, backend="eager")
    gated(images=3)
    assert tgate_compile.describe(gated).strip == "FFFppp" * 3


def test_second_order_schedulers() -> None:
    scheduler = diffusers.HeunDiscreteScheduler
    for pipeline in (OneAfterTheOther, SetAgain):

        class Scaled(pipeline):  # type: ignore[misc, valid-type]
            def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
                return super().denoised(self.scheduler.scale_model_input(latents, timestep), timestep, texts)

        gated = tgate_compile.optimize(looping(Scaled, scheduler(**VELOCITY)), GATE, backend="eager")
        if pipeline is OneAfterTheOther:
            # The scheduler's state is at the end and cannot go back, so the scheduler itself raises.
            with pytest.raises(IndexError):
                gated()
        else:
            gated()
            assert tgate_compile.describe(gated).strip == "FFFpppFFFppp"


class GoingBack(Looping):
    """Repeats some of the timesteps, as in resampling."""

    def timesteps(self) -> Iterator[Any]:
        timesteps = self.scheduler.timesteps
        yield from [*timesteps[:4], *timesteps[2:]]


def test_going_back_begins_anew() -> None:
    # After the jump four timesteps are left, of which three run in full.
    check(lambda: looping(GoingBack), [0, 4], "FFFpFFFp")


class Broken(Looping):
    """Stops a pass early, and then makes one over all timesteps."""

    def timesteps(self) -> Iterator[Any]:
        yield from self.scheduler.timesteps[:2]
        yield from self.scheduler.timesteps


def test_a_pass_that_was_left_early() -> None:
    check(lambda: looping(Broken), [0, 2], "FFFFFppp")


class Beyond(Looping):
    """Continues after the last timestep, with timesteps that the scheduler does not have."""

    def timesteps(self) -> Iterator[Any]:
        yield from self.scheduler.timesteps
        yield from (torch.tensor(value) for value in (-1, -2))


def test_calls_beyond_the_timesteps_are_refused() -> None:
    pipe = tgate_compile.optimize(looping(Beyond), GATE, backend="eager")
    with pytest.raises(tgate_compile.UnsupportedModelError, match=r"more timesteps than the 6.*num_timesteps"):
        pipe()


class Refined(Looping):
    """Denoises again at the same timestep after the scheduler's step (a corrector)."""

    def stepped(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        latents = super().stepped(prediction, timestep, latents)
        return latents - 0.01 * self.guided(latents, timestep, 5.0)


class Twice(Looping):
    """Evaluates the halves in separate calls, in an unknown order."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        uncond = self.denoised(latents, timestep, TEXTS_OF_NOTHING[: len(latents)])
        cond = self.denoised(latents, timestep, TEXTS_OF_NOTHING[: len(latents)] * 2)
        return uncond + scale * (cond - uncond)


TEXTS_OF_NOTHING = torch.ones(2, 16, 32)


@pytest.mark.parametrize(
    ("pipeline", "reason"), [(Refined, "already stepped over"), (Twice, "twice for one timestep before DDIMScheduler")]
)
def test_several_calls_for_a_timestep_are_refused(pipeline: type[Looping], reason: str) -> None:
    pipe = tgate_compile.optimize(looping(pipeline), GATE, backend="eager")
    with pytest.raises(tgate_compile.UnsupportedModelError, match=reason):
        pipe()
    plain = looping(pipeline)()
    tgate_compile.restore(pipe)
    assert torch.equal(pipe(), plain)
    tgate_compile.optimize(pipe, GATE, backend="eager", on_unsupported="plain")
    assert torch.equal(pipe(), plain)


def test_a_loop_of_ones_own_with_two_passes() -> None:
    pipe = looping()
    loop = type(pipe).__call__
    expected = loop(pipe)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    once = pipe()
    assert_differ(once, expected)
    with tgate_compile.generation(pipe, guidance=True):
        for _ in range(2):
            assert torch.equal(loop(pipe), once)
    assert tgate_compile.describe(pipe).strip == "FFFpppFFFppp"


def test_the_scheduler_is_as_it_was() -> None:
    scheduler = DDIMScheduler(**VELOCITY)
    pipe = tgate_compile.optimize(looping(scheduler=scheduler), GATE, backend="eager")
    seen = []
    pipe(
        callback=lambda pipe, timestep, latents: seen.append(
            (type(pipe.scheduler).__name__, isinstance(scheduler, DDIMScheduler))
        )
    )
    assert set(seen) == {("DDIMScheduler", True)}
    assert type(scheduler) is DDIMScheduler
    assert not {"step", "set_timesteps"} & set(vars(scheduler))
    with pytest.raises(ZeroDivisionError):
        pipe(callback=lambda *arguments: 1 / 0)
    assert type(scheduler) is DDIMScheduler
