"""Convert schedules to the rows of a manifest, from which a runtime reads what each step does."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from tgate_compile._errors import ConfigurationError
from tgate_compile.bundle.manifest import Manifest, PlannedPhase, Plans, phase_of, phase_spec
from tgate_compile.methods.method import Kind, Part, Phase, checked_gate_step
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import read_schedule

#: The largest number of steps for which rows are written.
MAX_STEPS = 64
#: The digits of a row. With three kinds that are each computed, handed on or reused, a schedule has up to 54 phases and
#: the few at its gate.
_DIGITS = string.digits + string.ascii_lowercase + string.ascii_uppercase


def plans_of(schedule: Schedule, graphs: Mapping[Phase, str]) -> Plans | None:
    """Return the rows of `schedule`, or None if its steps are only decided while a generation runs.

    Args:
        schedule: the schedule of the bundle.
        graphs: the names of the bundle's graphs, by the phase that each serves.
    """
    if schedule.guidance_similarity is not None:
        return None
    places: dict[_Planned, int] = {}

    def row(plan: Iterable[_Planned]) -> list[int]:
        return [places.setdefault(planned, len(places)) for planned in plan]

    (full_guided,), (full_unguided,) = (row([(Phase(guided), ())]) for guided in (True, False))
    steps = range(1, MAX_STEPS + 1)
    own = {guided: [row(_planned(schedule, count, guided)) for count in steps] for guided in (True, False)}
    gated = {guided: _moved(schedule, guided) for guided in (True, False)}
    moved = {guided: None if plans is None else [row(plan) for plan in plans] for guided, plans in gated.items()}
    # Forecasts have weights of their own for each distance of the steps, so one digit may not be enough.
    width: Literal[1, 2] = 1 if len(places) <= len(_DIGITS) else 2
    if len(places) > len(_DIGITS) ** width:
        return None

    def written(rows: Iterable[list[int]]) -> list[str]:
        return ["".join(_digits(place, width) for place in each) for each in rows]

    guided, unguided = moved[True], moved[False]
    return Plans(
        phases=[_planned_phase(schedule, graphs, planned) for planned in places],
        width=width,
        guided=written(own[True]),
        unguided=written(own[False]),
        gates=[None if schedule.gate_step is None else min(schedule.gate(count), count) for count in steps],
        gated_guided=None if guided is None else written(guided),
        gated_unguided=None if unguided is None else written(unguided),
        full_guided=full_guided,
        full_unguided=full_unguided,
    )


#: The graphs of a step that is decided at run time: the key of each in `PlannedPhase`, and the part that it computes.
_PARTS: Mapping[str, Part] = {"graph": "head", "tail": "tail", "finish": "finish"}

#: The phase of a step, and the weights of forecast kinds.
_Planned = tuple[Phase, tuple[tuple[Kind, tuple[float, ...]], ...]]


def _planned(schedule: Schedule, num_steps: int, guided: bool) -> list[_Planned]:
    weights = schedule.forecast_weights(num_steps, guided=guided)
    plan = schedule.plan(num_steps, guided=guided)
    return [(phase, tuple(of_step.items())) for phase, of_step in zip(plan, weights, strict=True)]


def _planned_phase(schedule: Schedule, graphs: Mapping[Phase, str], planned: _Planned) -> PlannedPhase:
    phase, weights = planned
    parts: dict[str, str | None] = {"graph": graphs.get(schedule.graph_phase(phase))}
    settled: list[str] = []
    if phase.decided:
        parts = {key: graphs.get(phase.of_part(part)) for key, part in _PARTS.items()}
        settled = [phase.settled(skipped=skipped).character for skipped in (False, True)]
    return PlannedPhase(
        letter=phase.character,
        phase=phase_spec(phase),
        weights={kind: list(of_kind) for kind, of_kind in weights},
        settled=settled,
        **parts,
    )


def _digits(place: int, width: int) -> str:
    return "".join(_DIGITS[place // len(_DIGITS) ** power % len(_DIGITS)] for power in reversed(range(width)))


def plan_from(plans: Plans, num_steps: int, *, guided: bool, gate_step: int | None = None) -> list[PlannedPhase]:
    """Return what each of `num_steps` steps does; `gate_step` moves the gate.

    Raises:
        ConfigurationError: the plans do not cover so many steps, or the gate cannot be moved.
    """
    if num_steps > MAX_STEPS or (gate_step is not None and gate_step > MAX_STEPS):
        raise ConfigurationError(f"This bundle has plans for up to {MAX_STEPS} steps.")
    if gate_step is None:
        row = (plans.guided if guided else plans.unguided)[num_steps - 1]
    else:
        rows = plans.gated_guided if guided else plans.gated_unguided
        if rows is None:
            raise ConfigurationError("The gate of this bundle's schedule cannot be moved.")
        row = rows[gate_step - 1][: num_steps * plans.width]
    digits = [_DIGITS.index(digit) for digit in row]
    if plans.width == 2:
        digits = [high * len(_DIGITS) + low for high, low in zip(digits[::2], digits[1::2], strict=True)]
    return [plans.phases[place] for place in digits]


def plan_for(
    manifest: Manifest, num_steps: int, *, guided: bool, gate_step: int | float | None = None
) -> list[PlannedPhase]:
    """Return what each step of a generation with the bundle of `manifest` does.

    The plan is read from the manifest's rows. If these do not cover the generation, it is computed from the schedule.

    Raises:
        ConfigurationError: the schedule has no gate to move, or `gate_step` is not valid.
    """
    plans = manifest.method.plans
    if gate_step is not None:
        gate_step = checked_gate_step(gate_step)
    if plans is not None and num_steps <= MAX_STEPS:
        is_moved = isinstance(gate_step, int) and gate_step <= MAX_STEPS and plans.gated_guided is not None
        if gate_step is None or is_moved:
            return plan_from(plans, num_steps, guided=guided, gate_step=gate_step)  # type: ignore[arg-type]
    schedule = read_schedule(manifest.method.schedule)
    schedule = schedule if gate_step is None else replace(schedule, gate_step=gate_step)
    graphs = {phase_of(graph.phase): name for name, graph in manifest.graphs.items() if graph.stage == "step"}
    return [_planned_phase(schedule, graphs, planned) for planned in _planned(schedule, num_steps, guided)]


def _moved(schedule: Schedule, guided: bool) -> list[list[_Planned]] | None:
    """Return the plan for each gate step; None unless the plan for fewer steps is always a prefix of a longer one."""
    if schedule.gate_step is None:
        return None
    moved = [replace(schedule, gate_step=gate) for gate in range(1, MAX_STEPS + 1)]
    plans = [one.plan(MAX_STEPS, guided=guided) for one in moved]
    for gate in (1, 10, 40):  # if a rule depends on the number of steps, it does so at every gate step
        if any(moved[gate].plan(n, guided=guided) != plans[gate][:n] for n in range(1, MAX_STEPS)):
            return None
    return [_planned(one, MAX_STEPS, guided) for one in moved]


logger = logging.getLogger(__name__)


def openings(graphs: Sequence[str]) -> int:
    """Return how often a graph is opened in steps that run `graphs`, if only one graph is open at a time."""
    return len(graphs[:1]) + sum(one != other for one, other in pairwise(graphs))


def warn_of_alternation(manifest: Manifest) -> None:
    """Log a warning if the schedule returns to a graph that it has left."""
    # A decided step is counted as if its blocks were computed.
    graphs = [name for step in manifest.example.steps for name in (step.graph, step.tail) if name is not None]
    if openings(graphs) > len(set(graphs)):
        logger.warning(
            "With this schedule, a generation of %d steps opens a graph %d times if only one is open at a time "
            "(sequential=True), and opening one takes longer than a step. A schedule that changes graphs only once, "
            "such as T-GATE v1, does not have this cost.",
            len(manifest.example.steps),
            openings(graphs),
        )
