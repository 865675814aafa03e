"""The methods that are measured, as data, and why one does not apply to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tgate_compile._capture import deep_layer
from tgate_compile._errors import UnsupportedModelError
from tgate_compile._schedule import Schedule

PLAIN = "plain"
FEWER_STEPS = "fewer_steps"
#: The one whose cost "fewer steps" is to have.
TGATE = "tgate"

#: Of the authors of T-GATE v2 and of DeepCache, in their packages.
_SP_INTERVAL = 5
_DEEPCACHE_INTERVAL = 3

WHY_NO_UNET = "DeepCache needs a UNet, whose deep part it skips in most steps. {denoiser} is a transformer."
WHY_NO_GUIDANCE = "This model runs without guidance, so that there is none to stop."
WHY_SAME = "In {steps} steps of this model it would do the very same as {other}."
WHY_NO_STEP = "T-GATE saves {saved:.0%} of the operations here: less than half of one of the {steps} steps."
WHY_NO_COST = "What T-GATE costs here is not known, so neither are the steps that cost as much."


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Attributes:
        key: for programs.
        title: for people.
        schedule: None for the plain pipeline.
    """

    key: str
    title: str
    schedule: Schedule | None = None


def methods_for(gate: int) -> tuple[Method, ...]:
    """All methods, the plain pipeline first; guidance stops at the same step in all that stop it."""
    return (
        Method(PLAIN, "plain"),
        Method(TGATE, "T-GATE v1", Schedule(gate)),
        Method("tgate_v2", "T-GATE v2", Schedule(gate, sp_interval=_SP_INTERVAL)),
        Method("deepcache", "DeepCache", Schedule(None, deepcache_interval=_DEEPCACHE_INTERVAL)),
        Method("deepcache_tgate", "DeepCache + T-GATE", Schedule(gate, deepcache_interval=_DEEPCACHE_INTERVAL)),
        Method("adaptive_guidance", "Adaptive Guidance", Schedule(None, guidance_step=gate)),
        Method(FEWER_STEPS, "fewer steps"),
    )


def why_not(
    method: Method, methods: Sequence[Method], denoisers: Mapping[str, torch.nn.Module], *, steps: int, guided: bool
) -> str | None:
    """Why `method`, one of `methods`, does not apply to a model; None if it does."""
    schedule = method.schedule
    if schedule is None:
        return None
    if "deep" in schedule.kinds:
        for denoiser in denoisers.values():
            try:
                deep_layer(denoiser, schedule.deepcache_branch)
            except UnsupportedModelError:
                return WHY_NO_UNET.format(denoiser=type(denoiser).__name__)
    if schedule.guidance_step is not None and not guided:
        return WHY_NO_GUIDANCE
    strip = schedule.strip(steps, guided=guided)
    for other in methods[: methods.index(method)]:
        plain = ("F" if guided else "f") * steps
        if strip == (plain if other.schedule is None else other.schedule.strip(steps, guided=guided)):
            return WHY_SAME.format(steps=steps, other=other.title)
    return None


def steps_at_equal_cost(steps: int, share: float | None) -> tuple[int, str | None]:
    """How many of `steps` plain steps cost `share` of them all; and why this is no comparison, if it is none."""
    if share is None:
        return steps, WHY_NO_COST
    fewer = max(1, round(steps * share))
    return fewer, WHY_NO_STEP.format(saved=1 - share, steps=steps) if fewer >= steps else None
