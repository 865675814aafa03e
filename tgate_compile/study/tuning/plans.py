"""What `tune` tries: gates, numbers of steps, and plans of which steps compute the layers that a method caches."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.methods.adaptive_guidance import AdaptiveGuidance
from tgate_compile.methods.block_cache import BlockCache
from tgate_compile.methods.fora import Fora
from tgate_compile.methods.method import Method, Phase
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.methods.tgate import TGate
from tgate_compile.pipeline.attach import attached
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.tuning.measure import Bench, GraphCosts, Measured, Plain

#: The gates of the grid, as fractions of the steps; the paper's gate is at 0.4.
GRID = (0.12, 0.24, 0.4, 0.6, 0.8)
#: Numbers of steps of the baseline "fewer steps", as fractions of the steps; multistep schedulers need at least a few.
FEWER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_STEPS = 4
#: T-GATE v2's interval, as in the paper.
SP_INTERVAL = 5


@dataclass(frozen=True)
class Sweep:
    """Schedules that differ in one number; the larger it is, the less the images drift from the plain pipeline's.

    Attributes:
        name: name in tables and plots.
        schedule: returns the schedule for a gate, or for another end of the expensive steps.
    """

    name: str
    schedule: Callable[[int], Schedule]


TGATE = Sweep("T-GATE", lambda gate: Schedule(gate))
#: Caches the prompt's half only, not the mean of both halves.
TGATE_COND = Sweep("T-GATE, cond cached", lambda gate: Schedule(gate, anchor_weight=1.0))
TGATE_V2 = Sweep("T-GATE v2", lambda gate: Schedule(gate, sp_interval=SP_INTERVAL))
GUIDANCE_DROP = Sweep("guidance drop", lambda gate: Schedule(None, guidance_step=gate))


def grid_of(num_steps: int) -> list[int]:
    """Return the gates to try first."""
    return sorted({gate for fraction in GRID if 0 < (gate := round(fraction * num_steps)) < num_steps})


def next_gate(within: dict[int, bool], num_steps: int) -> int | None:
    """Return the gate to try next: halfway between the last one outside the tolerance and the first one within it.

    Return None if none is left in between. Gate 0 counts as outside the tolerance, and `num_steps`, which never
    gates, as within it.
    """
    first = min((gate for gate, is_within in within.items() if is_within), default=num_steps)
    last = max((gate for gate, is_within in within.items() if not is_within and gate < first), default=0)
    return (first + last) // 2 if first - last > 1 else None


def fewer_steps(num_steps: int) -> Sequence[int]:
    """Return the numbers of steps of the baseline "fewer steps"."""
    return sorted({steps for fraction in FEWER if LEAST_STEPS <= (steps := round(fraction * num_steps)) < num_steps})


#: The first masks: the n-th of m computed steps is at (n / m) ** shape of all steps. Above 1, early steps are dense.
SHAPES = (0.7, 1.0, 1.4, 2.0)
#: When guidance ends or the gate acts, as fractions of the steps, beside plans in which neither happens.
ENDS = (0.4, 0.6)
#: How often all computed steps are moved in turn. Later passes hardly ever find anything.
PASSES = 2
#: The number of families whose best plan is refined.
REFINED = 2

Made = TypeVar("Made")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Plans that differ in the steps that are computed.

    Attributes:
        method: returns a method for a mask, one digit per step: `1` to compute, `0` to skip.
        end: ends guidance or closes the gate; None if neither happens.
    """

    method: Callable[[str], Method]
    end: Method | None

    def schedule(self, mask: str) -> Schedule:
        """Return the schedule with this mask."""
        method = schedule_of(self.method(mask))
        return method if self.end is None else method + self.end


def families(num_steps: int, *, guided: bool, gates: bool, blocks: bool) -> Iterator[Family]:
    """Yield the families to search: each method, with each forecast, alone and with each end.

    Args:
        num_steps: the number of steps.
        guided: whether the pipeline runs with guidance, which can end.
        gates: whether the methods can be combined with T-GATE, as they can if there is cross-attention.
        blocks: whether the denoiser is one stack of blocks.
    """
    ends: list[Method | None] = [None]
    for step in sorted({round(fraction * num_steps) for fraction in ENDS} - {0}) if guided else ():
        ends += [AdaptiveGuidance(step=step), *([TGate(step, anchor_weight=1.0)] if gates else [])]
    for order in (0, 1):
        for end in ends:
            yield Family(partial(_fora, order), end)
            if blocks:
                yield Family(partial(_block_cache, order), end)


def _fora(order: int, mask: str) -> Method:
    return Fora(mask=mask, forecast=order)


def _block_cache(order: int, mask: str) -> Method:
    return BlockCache(mask=mask, front=0, forecast=order)


@dataclass(frozen=True)
class Plan:
    """A plan and its measurements.

    Attributes:
        schedule: the schedule.
        measured: the measurements of its images.
        cost: the multiply-accumulates relative to the plain pipeline.
    """

    schedule: Schedule
    measured: Measured
    cost: float

    @property
    def drift(self) -> float:
        """The mean drift of the images."""
        return statistics.fmean(self.measured.drifts)


class PlanSearch:
    """Searches for the plans with the least drift under a budget.

    Args:
        pipe: the plain pipeline.
        denoiser: the name of its only denoiser.
        bench: measures schedules on the pipeline.
        plain: the measurements of the plain pipeline.
        options: further arguments of `attached`: the backend and the precision.
        on_plan: called with a description before a plan is measured.
        guided: whether the pipeline runs with guidance.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoiser: str,
        bench: Bench,
        plain: Plain,
        options: Mapping[str, Any],
        on_plan: Callable[[str], None],
        *,
        guided: bool,
    ) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._bench = bench
        self._plain = plain
        self._options = options
        self._on_plan = on_plan
        self._guided = guided
        self._found: dict[Schedule, Plan] = {}
        self._costs: dict[Family, GraphCosts] = {}

    def run(self, chosen: Iterable[Family], budget: float) -> list[Plan]:
        """Return the best plan of each family that fits, after refining the best ones."""
        best: list[tuple[Family, str]] = []
        for family in chosen:
            try:
                masks = self._within(family, partial(self._first, family, budget))
            except UnsupportedModelError as error:
                logger.info("skipping plans of %s: %s", family.method("1"), error)
                continue
            if masks:
                best.append((family, min(masks, key=lambda mask: self._plan(family, mask).drift)))
        best.sort(key=lambda each: self._plan(*each).drift)
        for place, (family, mask) in enumerate(best[:REFINED]):
            best[place] = family, self._within(family, partial(self._refined, family, mask, budget))
        return [self._plan(family, mask) for family, mask in best]

    def _within(self, family: Family, work: Callable[[], Made]) -> Made:
        with attached(self._pipe, family.schedule(self._alternating), (self._denoiser,), **self._options):
            return work()

    @property
    def _alternating(self) -> str:
        return ("10" * self._plain.num_steps)[: self._plain.num_steps]

    def _first(self, family: Family, budget: float) -> list[str]:
        """Measure the first masks of `family`, and return them."""
        self._plan(family, self._alternating)  # makes the graphs, whose costs are needed
        masks = first_masks(self._plain.num_steps, partial(self._cost, family), budget)
        for mask in masks:
            self._plan(family, mask)
        return masks

    def _refined(self, family: Family, mask: str, budget: float) -> str:
        return refined(mask, lambda mask: self._plan(family, mask).drift, partial(self._cost, family), budget)

    def _plan(self, family: Family, mask: str) -> Plan:
        schedule = family.schedule(mask)
        if schedule not in self._found:
            self._on_plan(str(schedule))
            measured = self._bench.run_gated(schedule, self._plain)
            self._costs[family] = GraphCosts.of(required_state_of(self._pipe).hooks[self._denoiser])
            self._found[schedule] = Plan(schedule, measured, measured.macs / self._bench.macs_of(self._plain))
        return self._found[schedule]

    def _cost(self, family: Family, mask: str) -> float:
        """Return the relative multiply-accumulates of a mask, from its graphs if these exist already."""
        schedule, costs = family.schedule(mask), self._costs[family]
        calls = 2 if required_state_of(self._pipe).family.calls else 1  # each half may have its own
        full = Phase(self._guided)
        try:
            macs, plain = (
                sum(costs.macs_of([phase]) * (calls if phase.guided else 1) for phase in plan)
                for plan in (schedule.plan(self._plain.num_steps, guided=self._guided), [full] * self._plain.num_steps)
            )
        except KeyError:
            return self._plan(family, mask).cost
        return macs / plain


def mask_of(num_steps: int, computed: int, shape: float) -> str:
    """Return a mask with `computed` of `num_steps` steps, the first one among them, spread according to `shape`."""
    steps: list[int] = []
    for place in range(computed):
        wanted = round(num_steps * (place / computed) ** shape)
        latest = num_steps - (computed - place)  # so that there is room for the others
        steps.append(min(max(wanted, steps[-1] + 1 if steps else 0), latest))
    return "".join("1" if step in steps else "0" for step in range(num_steps))


def first_masks(num_steps: int, costs: Callable[[str], float], budget: float) -> list[str]:
    """Return for each shape the mask with the most computed steps within the budget; none if even one is too many."""
    found = []
    for shape in SHAPES:
        masks = (mask_of(num_steps, computed, shape) for computed in range(num_steps - 1, 0, -1))
        found += [mask for mask in masks if costs(mask) <= budget][:1]
    return list(dict.fromkeys(found))


def refined(mask: str, drift: Callable[[str], float], costs: Callable[[str], float], budget: float) -> str:
    """Return the best mask that moving one computed step at a time leads to, each by one or two places."""
    best = drift(mask)
    for _ in range(PASSES):
        before = mask
        for step in [step for step, digit in enumerate(mask) if digit == "1" and step > 0]:
            for other in (step - 1, step + 1, step - 2, step + 2):
                moved = _moved(mask, step, other)
                if moved is None or costs(moved) > budget:
                    continue
                if drift(moved) < best:
                    mask, best = moved, drift(moved)
                    break
        if mask == before:
            break
    return mask


def _moved(mask: str, step: int, other: int) -> str | None:
    """Return `mask` with `other` computed instead of `step`; None if the mask does not allow it."""
    if not 0 < other < len(mask) or mask[step] != "1" or mask[other] != "0":
        return None
    digits = list(mask)
    digits[step], digits[other] = "0", "1"
    return "".join(digits)
