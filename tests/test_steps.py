"""Counting steps: the steps of each scheduler's calls, against values written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

from tgate_compile import ConfigurationError
from tgate_compile.pipeline.progress import StepCounter


def steps(scheduler: Any, requested: int, visited: int | None = None) -> list[int]:
    """Return the step of each denoiser call in a loop over `visited` timesteps (the last ones, as with `strength`)."""
    scheduler.set_timesteps(requested)
    counter = StepCounter.of(scheduler, visited)
    return [counter.step(call) for call in range(visited or len(scheduler.timesteps))]


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_one_call_per_step(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    assert steps(scheduler, 4) == [0, 1, 2, 3]
    assert StepCounter.of(scheduler, None).num_steps == 4


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_two_calls_per_step_but_one_in_the_last(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    assert steps(scheduler, 4) == [0, 0, 1, 1, 2, 2, 3]
    assert StepCounter.of(scheduler, None).num_steps == 4
    assert steps(scheduler, 1) == [0]


def test_warm_up_call_is_no_step() -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    assert steps(scheduler, 4) == [0, 0, 1, 2, 3]
    assert StepCounter.of(scheduler, None).num_steps == 4


def test_runge_kutta_warm_up() -> None:
    # PNDM with its Runge-Kutta steps: 12 timesteps for the first 3 of 10 steps, so 9 calls are extra.
    scheduler = diffusers.PNDMScheduler()
    assert steps(scheduler, 10) == [0] * 10 + list(range(1, 10))
    assert StepCounter.of(scheduler, None).num_steps == 10


@pytest.mark.parametrize(
    ("name", "visited", "expected"),
    [
        ("DDIMScheduler", 3, [0, 1, 2]),
        ("HeunDiscreteScheduler", 5, [0, 0, 1, 1, 2]),
        ("PNDMScheduler", 4, [0, 0, 1, 2]),
    ],
)
def test_some_of_the_timesteps(name: str, visited: int, expected: list[int]) -> None:
    scheduler = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    assert steps(scheduler, 6, visited) == expected
    assert StepCounter.of(scheduler, visited).num_steps == 3


def test_custom_timesteps() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    counter = StepCounter.of(scheduler, None)
    assert (counter.num_steps, counter.warmup_calls) == (3, 0)


def test_scheduler_without_a_number_of_steps() -> None:
    counter = StepCounter.of(SimpleNamespace(timesteps=[3, 3, 2, 2, 1], order=2), None)
    assert counter == StepCounter(warmup_calls=0, calls_per_step=2, num_calls=5, num_steps=3)
    assert StepCounter.of(SimpleNamespace(timesteps=[3, 2, 1]), None).num_steps == 3


def test_at_least_one_step() -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(6)
    assert StepCounter.of(scheduler, 1).num_steps == 1


@pytest.mark.parametrize("timesteps", [None, []])
def test_no_timesteps(timesteps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"SimpleNamespace has no timesteps.*set_timesteps"):
        StepCounter.of(SimpleNamespace(timesteps=timesteps), None)
