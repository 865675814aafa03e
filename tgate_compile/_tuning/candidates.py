"""Which schedules are tried, if nobody says so: a few families, each along a grid of gates, then where it matters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tgate_compile._schedule import Schedule

#: Where the gates of the grid lie, as fractions of the steps; the paper's gate is at 0.4.
GRID = (0.12, 0.24, 0.4, 0.6, 0.8)
#: The number of steps of the baseline "fewer steps", as fractions of the steps; schedulers of several stages need some.
FEWER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_STEPS = 4
#: T-GATE v2's interval, as in the paper.
SP_INTERVAL = 5


@dataclass(frozen=True)
class Family:
    """Schedules that differ in one number, along which the images drift less and less from the plain pipeline's.

    Attributes:
        name: in tables and plots.
        schedule: from the gate (or another end of the expensive steps) to the schedule.
    """

    name: str
    schedule: Callable[[int], Schedule]


TGATE = Family("T-GATE", lambda gate: Schedule(gate))
#: With the prompt's own half in the caches, not the mean of the halves.
TGATE_COND = Family("T-GATE, cond cached", lambda gate: Schedule(gate, anchor_weight=1.0))
TGATE_V2 = Family("T-GATE v2", lambda gate: Schedule(gate, sp_interval=SP_INTERVAL))
GUIDANCE_DROP = Family("guidance drop", lambda gate: Schedule(None, guidance_step=gate))


def grid_of(num_steps: int) -> list[int]:
    """The gates to begin with."""
    return sorted({gate for fraction in GRID if 0 < (gate := round(fraction * num_steps)) < num_steps})


def next_gate(within: dict[int, bool], num_steps: int) -> int | None:
    """The gate to try next, given which gates are within the tolerance: halfway between the last that is not and the
    first that is. None if there is nothing in between.

    A gate of 0 is taken not to be, and one at the last step, which never gates, to be.
    """
    first = min((gate for gate, is_within in within.items() if is_within), default=num_steps)
    last = max((gate for gate, is_within in within.items() if not is_within and gate < first), default=0)
    return (first + last) // 2 if first - last > 1 else None


def fewer_steps(num_steps: int) -> Sequence[int]:
    """The numbers of steps of the baseline."""
    return sorted({steps for fraction in FEWER if LEAST_STEPS <= (steps := round(fraction * num_steps)) < num_steps})


def effect_of(schedule: Schedule, num_steps: int) -> Hashable:
    """What tells the images of one schedule from another's. What is reused is always what was computed last, so that
    the steps that reuse it say all."""
    steps = tuple((phase.guided, phase.reuse) for phase in schedule.plan(num_steps, guided=True))
    weights = (schedule.anchor_weight, schedule.deepcache_branch)
    return (steps, schedule.guidance_similarity, schedule.kept, weights)
