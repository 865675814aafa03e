"""Schedules: from step to phase. Every step-caching method is one, and each is pure data, checked before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, get_args

from tgate_compile._errors import ConfigurationError

#: What can be cached: the output of a cross-attention, of a self-attention, and the deep feature of a UNet (DeepCache).
Kind = Literal["cross", "self", "deep"]

#: One of the two predictions of classifier-free guidance.
Half = Literal["uncond", "cond"]

MSG_GATE_STEP = (
    "{name} must be a whole number of steps, at least 1 (10: ten steps in full), or a fraction of the "
    "steps strictly between 0 and 1 (0.4: the first 40 %), but got {given!r}."
)
MSG_COUNT = "{name} must be a whole number, at least {least}, but got {given!r}."
MSG_INTERVALS_WITHOUT_GATE = (
    "sp_interval and fi_interval are T-GATE's, and need a gate_step; got gate_step=None with sp_interval={sp} and "
    "fi_interval={fi}."
)
MSG_DEEP_AND_SELF = (
    "DeepCache cannot be combined with cached self-attention: got deepcache_interval={deep} with sp_interval={sp} and "
    "fi_interval={fi}. Leave the two intervals at 1."
)
MSG_SIMILARITY = "guidance_similarity must be a number between 0 and 1 (the paper's: 0.991), but got {given!r}."
MSG_KEEP = 'keep must be "uncond" (T-GATE\'s choice) or "cond" (Adaptive Guidance\'s), but got {given!r}.'
MSG_WEIGHT = "{name} must be a number, but got {given!r}."
MSG_WEIGHT_WITHOUT_GATE = "anchor_weight is how T-GATE's cache is merged, and needs a gate_step; got gate_step=None."
MSG_SEVERAL_ENDS = (
    "Guidance ends in one way: at gate_step, after guidance_step, or at guidance_similarity. "
    "Give one of them, not {given}."
)
MSG_NOTHING = "Nothing to do: give a gate_step, a deepcache_interval above 1, a guidance_step or a guidance_similarity."


@dataclass(frozen=True)
class Phase:
    """What one step does.

    Attributes:
        guided: the denoiser sees both guidance halves, [uncond; cond], batch 2B.
        emit: kinds of site whose values are handed on to later steps, as they are.
        merge: kinds whose values are handed on as the mean of the two halves, so that they have batch B
            (arXiv 2404.02747, section 3.2); only under guidance.
        reuse: kinds of site whose values come from an earlier step, and are not computed.
    """

    guided: bool
    emit: frozenset[Kind] = frozenset()
    merge: frozenset[Kind] = frozenset()
    reuse: frozenset[Kind] = frozenset()

    @property
    def name(self) -> str:
        """The name of the phase's graph in descriptions."""
        return _GRAPHS[self.reuse][0]

    @property
    def character(self) -> str:
        """The phase in a strip."""
        _, guided, unguided = _GRAPHS[self.reuse]
        return guided if self.guided else unguided


_GRAPHS: dict[frozenset[Kind], tuple[str, str, str]] = {
    # what is reused: name, character with guidance, character without
    frozenset(): ("full", "F", "f"),
    frozenset({"self"}): ("self-reused", "S", "s"),
    frozenset({"deep"}): ("shallow", "D", "d"),
    frozenset({"cross"}): ("pruned", "P", "p"),
    frozenset({"cross", "self"}): ("pruned, self-reused", "Q", "q"),
    frozenset({"cross", "deep"}): ("pruned, shallow", "R", "r"),
}

#: What the letters of a strip mean, capital ones.
GRAPH_NAMES: Mapping[str, str] = {guided: name for name, guided, _ in _GRAPHS.values()}

_CROSS: frozenset[Kind] = frozenset({"cross"})
_SELF: frozenset[Kind] = frozenset({"self"})
_DEEP: frozenset[Kind] = frozenset({"deep"})
_NONE: frozenset[Kind] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """When what is cached, and when guidance stops.

    - T-GATE v1: `gate_step` alone. Everything runs for `gate_step` steps; the cross-attentions are cached at the last
      of them; from step `gate_step` on they are reused and guidance does not run.
      Source: arXiv 2404.02747 v1, section 3.2 and algorithm 1.
    - T-GATE v2: before the gate self-attention is computed up to step `warm_up`, then at every `sp_interval`-th step
      and at the last one; after it at every `fi_interval`-th. Steps are counted from 0.
      Source: arXiv 2404.02747 v2, section 4, and the authors' package, 1.0.0.
    - DeepCache: `deepcache_interval` > 1. All but the outermost layers of a UNet are computed at every such step only;
      the count starts anew at the step before the gate, at the gate, and where guidance stops.
      Source: arXiv 2312.00858, section 3.3, uniform.
    - Guidance stops after `guidance_step` steps, and nothing is cached: Adaptive Guidance with a fixed step, and the
      honest baseline for T-GATE. With `guidance_similarity` it stops after the step at which the two predictions have
      become that similar. Source: arXiv 2312.12487, section 5.

    Attributes:
        gate_step: a number of steps (>= 1), or a fraction of the steps (0 < x < 1); None for no gate. A gate at or
            beyond the last step means: never gated.
        sp_interval: see above; 1 computes self-attention in every step before the gate.
        fi_interval: see above; 1 computes it in every step after the gate.
        warm_up: see above.
        deepcache_interval: see above; 1 is off.
        deepcache_branch: which of the skip connections the shallow part ends at; 0 is the outermost.
        guidance_step: a number of steps, or a fraction of them; None leaves guidance to the gate.
        guidance_similarity: the cosine similarity, above 0 and below 1, of the conditional and the unconditional
            prediction at which guidance stops; None leaves it to the steps.
        keep: the half that goes on once guidance has stopped. None is the papers' choice: uncond with a gate, cond
            without one.
        anchor_weight: the weight w of the cond half in what the gate caches, `(1 - w) * uncond + w * cond`. 0.5 is
            the paper's mean, 1 the cond half alone, and more goes beyond it.
    """

    gate_step: int | float | None = 10
    sp_interval: int = 1
    fi_interval: int = 1
    warm_up: int = 2
    deepcache_interval: int = 1
    deepcache_branch: int = 0
    guidance_step: int | float | None = None
    guidance_similarity: float | None = None
    keep: Half | None = None
    anchor_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("gate_step", "guidance_step"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_gate_step(getattr(self, name), name))
        for name in ("sp_interval", "fi_interval", "deepcache_interval"):
            object.__setattr__(self, name, _checked_count(getattr(self, name), name, least=1))
        for name in ("warm_up", "deepcache_branch"):
            object.__setattr__(self, name, _checked_count(getattr(self, name), name, least=0))
        intervals = {"sp": self.sp_interval, "fi": self.fi_interval}
        if self.gate_step is None and max(intervals.values()) > 1:
            raise ConfigurationError(MSG_INTERVALS_WITHOUT_GATE.format(**intervals))
        if self.deepcache_interval > 1 and max(intervals.values()) > 1:
            raise ConfigurationError(MSG_DEEP_AND_SELF.format(deep=self.deepcache_interval, **intervals))
        similarity = self.guidance_similarity
        if similarity is not None and not (isinstance(similarity, float) and 0.0 < similarity < 1.0):
            raise ConfigurationError(MSG_SIMILARITY.format(given=similarity))
        ends = {name: getattr(self, name) for name in ("gate_step", "guidance_step", "guidance_similarity")}
        given = {name: value for name, value in ends.items() if value is not None}
        if len(given) > 1:
            raise ConfigurationError(MSG_SEVERAL_ENDS.format(given=given))
        if not given and self.deepcache_interval == 1:
            raise ConfigurationError(MSG_NOTHING)
        if self.keep is not None and self.keep not in get_args(Half):
            raise ConfigurationError(MSG_KEEP.format(given=self.keep))
        object.__setattr__(self, "anchor_weight", _checked_weight(self.anchor_weight, "anchor_weight"))
        if self.anchor_weight != 0.5 and self.gate_step is None:
            raise ConfigurationError(MSG_WEIGHT_WITHOUT_GATE)

    def __str__(self) -> str:
        """What has been chosen, in words: `gate step 10, sp interval 5`."""
        values = ((field, getattr(self, field.name)) for field in fields(self) if field.name != "keep")
        chosen = [(f.name, v) for f, v in values if v is not None and (f.name == "gate_step" or v != f.default)]
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of site that some step reuses."""
        cross = _CROSS if self.gate_step is not None else _NONE
        self_attention = _SELF if max(self.sp_interval, self.fi_interval) > 1 else _NONE
        return cross | self_attention | (_DEEP if self.deepcache_interval > 1 else _NONE)

    @property
    def kept(self) -> Half:
        """The half that goes on once guidance has stopped."""
        return self.keep or ("uncond" if self.gate_step is not None else "cond")

    def gate(self, num_steps: int) -> int:
        """The first step after the gate, for a generation of `num_steps` steps; `num_steps` if there is none."""
        return _steps(self.gate_step, num_steps)

    def plan(self, num_steps: int, *, guided: bool) -> tuple[Phase, ...]:
        """What each of `num_steps` steps does; `guided` says whether guidance is on to begin with."""
        return _plan(self, num_steps, guided)

    def graph(self, phase: Phase) -> Phase:
        """The phase whose graph serves `phase`: it hands on all that any phase with these inputs does, at any step.

        One graph then serves them all, whatever the number of steps; the runtime keeps only what `phase` asks for.
        """
        if phase.reuse - _CROSS:
            return Phase(phase.guided, reuse=phase.reuse)
        deep = _DEEP if self.deepcache_interval > 1 else _NONE
        improving = _SELF if self.fi_interval > 1 else _NONE
        if phase.reuse:
            return Phase(phase.guided, emit=deep | improving, reuse=phase.reuse)
        planning = _SELF if self.sp_interval > 1 else _NONE
        at_gate = (_CROSS if self.gate_step is not None else _NONE) | improving
        if phase.guided:
            return Phase(True, emit=deep | planning, merge=at_gate)
        return Phase(False, emit=deep | planning | at_gate)

    def strip(self, num_steps: int, *, guided: bool = True) -> str:
        """One character a step; see `docs/schedules.md` for the letters."""
        return "".join(phase.character for phase in self.plan(num_steps, guided=guided))


@cache
def _plan(schedule: Schedule, num_steps: int, guided: bool) -> tuple[Phase, ...]:
    plan = tuple(_phase(schedule, step, num_steps, guided) for step in range(num_steps))
    check_plan(plan)
    return plan


def _phase(schedule: Schedule, step: int, num_steps: int, guided: bool) -> Phase:
    gate = schedule.gate(num_steps)
    if step < gate:
        guidance_end = _steps(schedule.guidance_step, num_steps)
        guided = guided and step < guidance_end
        reuse, emit = _before_gate(schedule, step, gate, restart=guidance_end if step >= guidance_end else 0)
        at_gate = _CROSS | (_SELF if schedule.fi_interval > 1 else _NONE)
        handed_on = at_gate if schedule.gate_step is not None and step == gate - 1 else _NONE
        if not guided:
            return Phase(False, emit=emit | handed_on, reuse=reuse)
        return Phase(True, emit=emit, merge=handed_on, reuse=reuse)
    reuse, emit = _after_gate(schedule, step, gate)
    return Phase(False, emit=emit, reuse=reuse | _CROSS)


def _before_gate(schedule: Schedule, step: int, gate: int, *, restart: int) -> tuple[frozenset[Kind], frozenset[Kind]]:
    """What a step before the gate reuses and emits, by the authors' rules; DeepCache counts from step `restart`."""
    last = schedule.gate_step is not None and step == gate - 1
    if schedule.deepcache_interval > 1:
        computed = last or (step - restart) % schedule.deepcache_interval == 0
        return (_NONE, _DEEP) if computed else (_DEEP, _NONE)
    if schedule.sp_interval == 1 or step < schedule.warm_up or last:
        return _NONE, _NONE
    computed = step == schedule.warm_up or step % schedule.sp_interval == 0
    return (_NONE, _SELF) if computed else (_SELF, _NONE)


def _after_gate(schedule: Schedule, step: int, gate: int) -> tuple[frozenset[Kind], frozenset[Kind]]:
    if schedule.deepcache_interval > 1:
        return (_NONE, _DEEP) if (step - gate) % schedule.deepcache_interval == 0 else (_DEEP, _NONE)
    if schedule.fi_interval == 1:
        return _NONE, _NONE
    return (_NONE, _SELF) if step % schedule.fi_interval == 0 else (_SELF, _NONE)


def check_plan(plan: Iterable[Phase]) -> None:
    """Check that nothing is reused that no earlier step handed on with the same batch.

    Raises:
        ConfigurationError: a step reuses what is not there.
    """
    at_hand: dict[Kind, bool] = {}  # kind -> whether what is at hand has both halves
    for step, phase in enumerate(plan):
        for kind in phase.reuse:
            if at_hand.get(kind) is not phase.guided:
                raise ConfigurationError(f"Step {step} reuses the {kind} cache, which no earlier step has made for it.")
        at_hand.update(dict.fromkeys(phase.emit, phase.guided))
        at_hand.update(dict.fromkeys(phase.merge, False))


def _steps(given: int | float | None, num_steps: int) -> int:
    if given is None:
        return num_steps
    return max(1, round(given * num_steps)) if isinstance(given, float) else given


def checked_gate_step(given: object, name: str = "gate_step") -> int | float:
    """`given` as a plain int (steps) or float (fraction).

    Raises:
        ConfigurationError: it is neither a whole number >= 1 nor a fraction strictly between 0 and 1.
    """
    if not isinstance(given, bool):
        if isinstance(given, float):
            if 0.0 < given < 1.0:
                return float(given)
        elif hasattr(given, "__index__"):
            steps = given.__index__()
            if steps >= 1:
                return int(steps)
    raise ConfigurationError(MSG_GATE_STEP.format(name=name, given=given))


def _checked_count(given: object, name: str, *, least: int) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__") or given.__index__() < least:
        raise ConfigurationError(MSG_COUNT.format(name=name, least=least, given=given))
    return int(given.__index__())


def _checked_weight(given: object, name: str) -> float:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        try:
            number = float(given)
        except OverflowError:  # an int beyond all floats
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigurationError(MSG_WEIGHT.format(name=name, given=given))
