"""Schedules: one or several methods that assign a phase to each step, as validated plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, reduce
from typing import Any, NamedTuple, get_args

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.adaptive_guidance import AdaptiveGuidance
from tgate_compile.methods.decisions import Rule
from tgate_compile.methods.deepcache import DeepCache
from tgate_compile.methods.method import (
    CROSS,
    DECIDED,
    DEEP,
    LAYERS,
    REUSED,
    Blocks,
    Half,
    Kind,
    Method,
    Phase,
    Share,
    Timeline,
    forecast_weights,
)
from tgate_compile.methods.tgate import TGate, refuse_options_without_gate

#: The methods whose options are fields of `Schedule`.
IN_SHORT: tuple[type[Method], ...] = (TGate, DeepCache, AdaptiveGuidance)

MSG_DEEP_AND_SELF = (
    "DeepCache cannot be combined with cached self-attention: got deepcache_interval={deep} with sp_interval={sp} and "
    "fi_interval={fi}. Leave the two intervals at 1."
)
MSG_SEVERAL_ENDS = (
    "Guidance can end in only one way: at gate_step, after guidance_step, or at guidance_similarity. "
    "Set one of them, but got {given}."
)
MSG_TEXT_OF_UNCOND = (
    'text_interval={interval} computes the prompt\'s influence again after the gate, but with keep="uncond" this is '
    "the influence of the negative prompt. Leave out one of them."
)
MSG_NOTHING = "Nothing to do: set a gate_step, a deepcache_interval above 1, a guidance_step or a guidance_similarity."


class Sought(NamedTuple):
    """The values that a schedule needs to find in a model, as the arguments of `capture` with these names."""

    kinds: frozenset[Kind]
    optional: frozenset[Kind]
    ranges: tuple[tuple[Kind, Blocks], ...]
    hidden: bool


@dataclass(frozen=True)
class Schedule:
    """A schedule of one or several methods, which defines what is cached at each step and when guidance ends.

    `TGate(10)`, `DeepCache(3) + TGate(10)` and `AdaptiveGuidance(step=10)` are accepted wherever a schedule is
    expected. The fields below are a short form: `Schedule(10, deepcache_interval=3)` equals
    `DeepCache(3) + TGate(10)`.

    Attributes:
        gate_step: `gate_step` of `TGate`: a number of steps (>= 1), or a fraction of the steps (0 < x < 1); None means
            no gate.
        sp_interval: `sp_interval` of `TGate`.
        fi_interval: `fi_interval` of `TGate`.
        warm_up: `warm_up` of `TGate`.
        deepcache_interval: `interval` of `DeepCache`; 1 switches it off.
        deepcache_branch: `branch` of `DeepCache`.
        guidance_step: `step` of `AdaptiveGuidance`; None means that guidance ends at the gate, if there is one.
        guidance_similarity: `similarity` of `AdaptiveGuidance`; None means that guidance does not depend on it.
        keep: the half that continues once guidance has ended. None means the papers' choice: uncond with a gate, cond
            without one; and cond with a `text_interval`, because only that half depends on the prompt.
        anchor_weight: `anchor_weight` of `TGate`.
        text_interval: `text_interval` of `TGate`.
        others: further methods, such as `PAB`.
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
    text_interval: int | None = None
    others: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        # Each method validates its own options, even if it is not in use.
        gated = TGate(
            10 if self.gate_step is None else self.gate_step,
            self.sp_interval,
            self.fi_interval,
            self.warm_up,
            self.anchor_weight,
            self.text_interval,
        )
        deep = DeepCache(self.deepcache_interval, self.deepcache_branch)
        for option in fields(TGate):
            if option.name != "gate_step" or self.gate_step is not None:
                object.__setattr__(self, option.name, getattr(gated, option.name))
        object.__setattr__(self, "deepcache_interval", deep.interval)
        object.__setattr__(self, "deepcache_branch", deep.branch)
        if self.guidance_step is not None:
            object.__setattr__(self, "guidance_step", AdaptiveGuidance(self.guidance_step).step)
        if self.guidance_similarity is not None:
            AdaptiveGuidance(similarity=self.guidance_similarity)
        if self.gate_step is None:
            refuse_options_without_gate(self.sp_interval, self.fi_interval, self.anchor_weight, self.text_interval)
        if self.deepcache_interval > 1 and max(self.sp_interval, self.fi_interval) > 1:
            values = {"deep": self.deepcache_interval, "sp": self.sp_interval, "fi": self.fi_interval}
            raise ConfigurationError(MSG_DEEP_AND_SELF.format(**values))
        ends = {name: getattr(self, name) for name in ("gate_step", "guidance_step", "guidance_similarity")}
        given = {name: value for name, value in ends.items() if value is not None}
        if len(given) > 1:
            raise ConfigurationError(MSG_SEVERAL_ENDS.format(given=given))
        if self.keep is not None and self.keep not in get_args(Half):
            raise ConfigurationError(
                f'keep must be "uncond" (T-GATE\'s choice) or "cond" (Adaptive Guidance\'s), but got {self.keep!r}.'
            )
        if self.keep == "uncond" and self.text_interval is not None:
            raise ConfigurationError(MSG_TEXT_OF_UNCOND.format(interval=self.text_interval))
        if not isinstance(self.others, tuple) or not all(isinstance(method, Method) for method in self.others):
            raise ConfigurationError(f"others must be a tuple of methods, but got {self.others!r}.")
        object.__setattr__(self, "others", tuple(sorted(self.others, key=lambda method: method.key)))
        if not self.methods:
            raise ConfigurationError(MSG_NOTHING)
        _check_together(self.methods)

    @classmethod
    def of(cls, method: Method) -> Schedule:
        """Return the schedule that consists of `method` alone."""
        off: dict[str, Any] = {"gate_step": None}
        if isinstance(method, TGate):
            return cls(**{option.name: getattr(method, option.name) for option in fields(method)})
        if isinstance(method, DeepCache) and method.interval > 1:
            return cls(**off, deepcache_interval=method.interval, deepcache_branch=method.branch)
        if isinstance(method, AdaptiveGuidance):
            return cls(**off, guidance_step=method.step, guidance_similarity=method.similarity)
        if isinstance(method, DeepCache):
            raise ConfigurationError("DeepCache(1) computes everything in every step; set an interval of at least 2.")
        return cls(**off, others=(method,))

    def __add__(self, other: Method | Schedule) -> Schedule:
        added = other if isinstance(other, Schedule) else Schedule.of(other)
        twice = {type(m) for m in self.methods} & {type(m) for m in added.methods}
        if twice:
            raise ConfigurationError(f"{twice.pop().title} is given twice: {self} and {added}.")
        choices: dict[str, Any] = {"others": (*self.others, *added.others)}
        for option in fields(self):
            if option.name != "others":
                mine, theirs = getattr(self, option.name), getattr(added, option.name)
                unset = None if option.name == "gate_step" else option.default
                choices[option.name] = theirs if mine == unset else mine
        return Schedule(**choices)

    def __str__(self) -> str:
        values = ((f, getattr(self, f.name)) for f in fields(self) if f.name not in ("keep", "others"))
        chosen = [(f.name, v) for f, v in values if v is not None and (f.name == "gate_step" or v != f.default)]
        return ", ".join([*(f"{name.replace('_', ' ')} {value}" for name, value in chosen), *map(str, self.others)])

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the schedule."""
        return _methods(self)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of sites that some step reuses."""
        return frozenset().union(*(method.kinds for method in self.methods))

    @property
    def optional_kinds(self) -> frozenset[Kind]:
        """The kinds that a model may lack."""
        return self.kinds.difference(*(method.kinds for method in self.methods if not method.tolerant))

    @property
    def needs_cross(self) -> bool:
        """Whether cross-attention, or the text in a joint attention, must be found in the model."""
        return "cross" in self.kinds - self.optional_kinds

    @property
    def ranges(self) -> tuple[tuple[Kind, Blocks], ...]:
        """The ranges of blocks by kind (`blocks`, `rear`, `measured`), in alphabetical order."""
        return tuple(sorted((pair for method in self.methods for pair in method.ranges.items()), key=lambda p: p[0]))

    @property
    def sought(self) -> Sought:
        """Everything that has to be found in a model."""
        hidden = any(method.hidden_text for method in self.methods)
        return Sought(self.kinds, self.optional_kinds, self.ranges, hidden)

    @property
    def forecasts(self) -> Mapping[Kind, int]:
        """The order of the forecast for each kind whose reused values are forecast."""
        return {kind: order for method in self.methods for kind, order in method.forecasts.items()}

    @property
    def rule(self) -> Rule | None:
        """The rule by which steps are decided at run time; None if all are known in advance."""
        return next((method.rule for method in self.methods if method.rule is not None), None)

    @property
    def estimating(self) -> Method | None:
        """The method that estimates the unconditional prediction at some steps, if there is one."""
        return next((method for method in self.methods if method.estimating), None)

    def forecast_weights(self, num_steps: int, *, guided: bool) -> tuple[Mapping[Kind, tuple[float, ...]], ...]:
        """Return for each step the weights of the last values, newest first, of each kind that is forecast.

        Kinds whose newest value is reused unchanged are left out, and so are kinds that are decided at run time.
        """
        return _forecast_weights(self, num_steps, guided)

    @property
    def kept(self) -> Half:
        """The half that continues once guidance has ended."""
        return self.keep or ("uncond" if self.gate_step is not None and self.text_interval is None else "cond")

    def gate(self, num_steps: int) -> int:
        """Return the first step after the gate, in a generation of `num_steps` steps; `num_steps` without a gate."""
        gates = [gate for method in self.methods if (gate := method.gate(num_steps)) is not None]
        return min(gates, default=num_steps)

    def plan(self, num_steps: int, *, guided: bool) -> tuple[Phase, ...]:
        """Return the phase of each of `num_steps` steps; `guided` means that guidance is on at the start."""
        return _plan(self, num_steps, guided)

    def graph_phase(self, phase: Phase) -> Phase:
        """Return the phase whose graph serves `phase`: it emits everything that phases with the same inputs may emit.

        One graph then serves all of them, for any number of steps; the runtime keeps only what `phase` emits.
        """
        if phase.part != "whole":
            return phase
        shares = [method.hands_on(phase.guided, phase.reuse) for method in self.methods]
        emit, merge, _ = _united(shares)
        return Phase(phase.guided, emit=emit - phase.reuse, merge=merge - phase.reuse, reuse=phase.reuse)

    def strip(self, num_steps: int, *, guided: bool = True) -> str:
        """Return one character for each step; `docs/reference/schedules.md` explains the letters."""
        return "".join(phase.character for phase in self.plan(num_steps, guided=guided))


def schedule_of(given: Method | Schedule) -> Schedule:
    """Return `given` as a schedule."""
    return given if isinstance(given, Schedule) else Schedule.of(given)


@cache
def _methods(schedule: Schedule) -> tuple[Method, ...]:
    found: list[Method] = []
    if schedule.deepcache_interval > 1:
        found.append(DeepCache(schedule.deepcache_interval, schedule.deepcache_branch))
    if schedule.gate_step is not None:
        intervals = (schedule.sp_interval, schedule.fi_interval, schedule.warm_up)
        found.append(TGate(schedule.gate_step, *intervals, schedule.anchor_weight, schedule.text_interval))
    if schedule.guidance_step is not None or schedule.guidance_similarity is not None:
        found.append(AdaptiveGuidance(schedule.guidance_step, schedule.guidance_similarity))
    return (*found, *schedule.others)


def _check_together(methods: Iterable[Method]) -> None:
    """Check that no two methods cache the same kind of values.

    Cross-attention is an exception: one method may cache it before a gate, and another after it.
    """
    claimed: dict[Kind, Method] = {}
    for method in methods:
        for kind in method.kinds - CROSS:
            if kind in claimed:
                both = f"{claimed[kind].title} and {method.title}"
                raise ConfigurationError(f"{both} cannot be combined: both cache the values of kind {kind!r}.")
            claimed[kind] = method
    for method in methods:
        if method.estimating:
            for other in methods:
                _check_beside_estimates(method, other)
        if method.kinds & LAYERS:
            for other in methods:
                _check_beside_skipped_layers(method, other)
        for kind in method.forecasts.keys() & CROSS:
            for other in methods:
                if other is not method and kind in other.kinds and not _caches_once(other):
                    raise ConfigurationError(
                        f"{method.title} with a forecast cannot be combined with {other.title}, which computes the "
                        "text's influence again at intervals. Leave out one of them, or the interval."
                    )


def _check_beside_skipped_layers(method: Method, other: Method) -> None:
    """Check that `other` caches nothing in the layers that `method` skips, which have no values when they are skipped.

    T-GATE caches its values at a step that computes everything, and never again.
    """
    if other is method or not other.kinds or (other.kinds == CROSS and _caches_once(other)):
        return
    if method.kinds == DEEP and isinstance(other, TGate):
        return  # these have their own check, and a graph that computes the text again may compute the deep layers
    raise ConfigurationError(
        f"{method.title} cannot be combined with {other.title}: the layers that {method.title} skips have no "
        f"values for {other.title} to cache."
    )


def _check_beside_estimates(method: Method, other: Method) -> None:
    """Check that `other` caches nothing at steps where `method` leaves out one half of guidance, as T-GATE does."""
    if other is method or not other.kinds or (other.kinds == CROSS and _caches_once(other)):
        return
    raise ConfigurationError(
        f"{method.title} cannot be combined with {other.title}: some steps of {method.title} compute only one half of "
        f"guidance, but {other.title} caches the values of both halves."
    )


def _caches_once(method: Method) -> bool:
    return isinstance(method, TGate) and method.text_interval is None


@cache
def _plan(schedule: Schedule, num_steps: int, guided: bool) -> tuple[Phase, ...]:
    gates = [gate for method in schedule.methods if (gate := method.gate(num_steps)) is not None]
    end = min((method.guided_steps(num_steps) for method in schedule.methods), default=num_steps)
    in_full = frozenset(gate - 1 for gate in gates)
    timeline = Timeline(num_steps, (0, end, *gates), in_full, end if guided else 0)
    plan = tuple(_phase(schedule, step, guided and step < end, timeline) for step in range(num_steps))
    for step, phase in enumerate(plan):
        known = (phase.reuse, phase.decided) in DECIDED if phase.decided else phase.reuse in REUSED
        if not known or (phase.decided and phase.emit | phase.merge):
            kinds = ", ".join(sorted(phase.reuse | phase.decided))
            raise ConfigurationError(f"{schedule}: step {step} reuses {kinds} together, which no graph supports.")
        served = schedule.graph_phase(phase)
        lacking = sorted((phase.emit - served.emit) | (phase.merge - served.merge))
        if lacking:
            raise ConfigurationError(
                f"{schedule}: step {step} emits {', '.join(lacking)}, which hands_on() of its methods does not return."
            )
    check_plan(plan)
    return plan


def _phase(schedule: Schedule, step: int, guided: bool, timeline: Timeline) -> Phase:
    if guided and schedule.estimating is not None and schedule.estimating.estimates(step, timeline):
        return Phase(False, estimated=True)  # no other method caches anything there; see `_check_beside_estimates`
    shares = [method.share(step, guided, timeline) for method in schedule.methods]
    emit, merge, reuse = _united(shares)
    decided = frozenset[Kind]().union(*(share.decided for share in shares))
    return Phase(guided, emit=emit - merge - reuse, merge=merge, reuse=reuse, decided=decided - reuse)


def _united(shares: Iterable[Share]) -> tuple[frozenset[Kind], frozenset[Kind], frozenset[Kind]]:
    whole = reduce(lambda a, b: Share(a.emit | b.emit, a.merge | b.merge, a.reuse | b.reuse), shares, Share())
    return whole.emit, whole.merge, whole.reuse


@cache
def _forecast_weights(schedule: Schedule, num_steps: int, guided: bool) -> tuple[Mapping[Kind, tuple[float, ...]], ...]:
    orders, gate = schedule.forecasts, schedule.gate(num_steps)
    # For each kind: whether its values have both halves, and the steps that computed them, newest first.
    held: dict[Kind, tuple[bool, list[int]]] = {}
    weights: list[Mapping[Kind, tuple[float, ...]]] = []
    for step, phase in enumerate(schedule.plan(num_steps, guided=guided)):
        if step == gate:  # the denoiser is another one from here on; what a gate freezes stays as it is
            held = {kind: (both, steps[:1]) for kind, (both, steps) in held.items() if kind == "cross"}
        of_step = {kind: forecast_weights(held[kind][1], step) for kind in sorted(phase.reuse & orders.keys())}
        weights.append({kind: each for kind, each in of_step.items() if len(each) > 1})
        for kind in (phase.emit | phase.merge) & orders.keys():
            both = phase.guided and kind not in phase.merge
            older = held[kind][1] if kind in held and held[kind][0] == both else []
            held[kind] = both, [step, *older[: orders[kind]]]
    return tuple(weights)


def check_plan(plan: Iterable[Phase]) -> None:
    """Check that every reused value was emitted by an earlier step with the same batch.

    Raises:
        ConfigurationError: a step reuses a value that does not exist.
    """
    cached: dict[Kind, bool] = {}  # for each cached kind, whether its values have both halves
    for step, phase in enumerate(plan):
        for kind in phase.needed:
            if cached.get(kind) is not phase.guided:
                raise ConfigurationError(f"Step {step} reuses the {kind} cache, which no earlier step has filled.")
        cached.update(dict.fromkeys(phase.emit, phase.guided))
        cached.update(dict.fromkeys(phase.merge, False))
