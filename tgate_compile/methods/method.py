"""The interface of caching methods, which define for each step which values are computed, emitted and reused."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from tgate_compile.methods.decisions import Rule
    from tgate_compile.methods.schedule import Schedule

#: A kind of value that can be cached: the output of a cross-attention, of a self-attention, of a temporal attention
#: (which counts as self-attention unless a method uses this kind), the deep feature of a UNet (DeepCache), the output
#: of a feed-forward module, the residual over a range of blocks (their output minus their input), or the keys and
#: values of the tokens of reference images in joint attention. Methods that skip two ranges use `rear` for the second.
#: Where a step is decided at run time, `measured` is the value whose change decides, and `state` stands for the values
#: that pass from the first part of the step to the second.
Kind = Literal[
    "cross", "self", "temporal", "deep", "ff", "blocks", "rear", "reference", "measured", "state"
]  # fmt: skip

#: The part of a step that a graph computes: all of it, or one of the parts of a step that is decided at run time. The
#: head computes the measure; then the tail computes the rest, or the finish skips the blocks.
Part = Literal["whole", "head", "tail", "finish"]

#: One of the two halves of classifier-free guidance.
Half = Literal["uncond", "cond"]

NONE: frozenset[Kind] = frozenset()
CROSS: frozenset[Kind] = frozenset({"cross"})
SELF: frozenset[Kind] = frozenset({"self"})
TEMPORAL: frozenset[Kind] = frozenset({"temporal"})
DEEP: frozenset[Kind] = frozenset({"deep"})
FF: frozenset[Kind] = frozenset({"ff"})
BLOCKS: frozenset[Kind] = frozenset({"blocks"})
REAR: frozenset[Kind] = frozenset({"rear"})
REFERENCE: frozenset[Kind] = frozenset({"reference"})
MEASURED: frozenset[Kind] = frozenset({"measured"})

#: The kinds for which whole layers are skipped, so that the values inside of them do not exist at such a step.
LAYERS: frozenset[Kind] = DEEP | BLOCKS | REAR

MSG_GATE_STEP = (
    "{name} must be a whole number of steps, at least 1 (10 means ten steps in full), or a fraction of the "
    "steps strictly between 0 and 1 (0.4 means the first 40 %), but got {given!r}."
)
MSG_COUNT = "{name} must be a whole number, at least {least}, but got {given!r}."


@dataclass(frozen=True)
class Phase:
    """The behaviour of one step.

    Attributes:
        guided: whether the denoiser gets both guidance halves, [uncond; cond], batch 2B.
        emit: the kinds of sites whose values are kept unchanged for later steps.
        merge: the kinds of sites whose values are kept for later steps as the mean of the two halves, batch B
            (arXiv 2404.02747, section 3.2); only under guidance.
        reuse: the kinds of sites whose values are taken from an earlier step instead of being computed.
        estimated: whether guidance continues although the denoiser gets the cond half only: the prediction for the
            other half is estimated from earlier ones (FasterCache).
        decided: the kinds of sites whose values are either reused, or computed and kept; this is decided during the
            step.
        part: the part of a decided step that the graph of this phase computes; "whole" if the step is not divided.
    """

    guided: bool
    emit: frozenset[Kind] = NONE
    merge: frozenset[Kind] = NONE
    reuse: frozenset[Kind] = NONE
    estimated: bool = False
    decided: frozenset[Kind] = NONE
    part: Part = "whole"

    @property
    def name(self) -> str:
        """The name of the phase's graph in descriptions."""
        if self.part != "whole":
            return f"{_NAMES[self.reuse]}, {self.part}" if self.reuse else self.part
        return _NAMES[self.reuse] if not self.decided else _DECIDED_NAMES[self.reuse, self.decided]

    @property
    def character(self) -> str:
        """The character of the phase in a strip: upper case for a batch of both guidance halves, else lower case."""
        if self.estimated:
            return ESTIMATED
        letter = _LETTERS[self.reuse] if not self.decided else _DECIDED[self.reuse, self.decided]
        return letter if self.guided else letter.lower()

    @property
    def taken(self) -> frozenset[Kind]:
        """The kinds of sites whose values the graph of this phase takes from earlier steps."""
        return self.reuse | self.decided if self.part == "finish" else self.reuse

    @property
    def needed(self) -> frozenset[Kind]:
        """The kinds of sites whose values from earlier steps this phase may need."""
        return self.reuse | self.decided | MEASURED if self.decided else self.reuse

    def of_part(self, part: Part) -> Phase:
        """Return the phase of the graph that computes a part of this step, which is decided at run time."""
        emit: Mapping[Part, frozenset[Kind]] = {"head": MEASURED, "tail": self.decided}
        return Phase(self.guided, emit=emit.get(part, NONE), reuse=self.reuse, decided=self.decided, part=part)

    def settled(self, *, skipped: bool) -> Phase:
        """Return the phase of this step once it is decided."""
        if skipped:
            return Phase(self.guided, reuse=self.reuse | self.decided)
        return Phase(self.guided, emit=self.decided | MEASURED, reuse=self.reuse)


#: The names of graphs by the kinds that they reuse, in this order.
_WORDS: Mapping[Kind, str] = {
    "cross": "pruned",
    "self": "self-reused",
    "temporal": "temporal-reused",
    "deep": "shallow",
    "ff": "ff-reused",
    "blocks": "blocks-skipped",
    "rear": "rear-skipped",
    "reference": "references-reused",
}
#: The letter of every set of kinds that a step may reuse, the common sets first. The set `Z`, which no method of this
#: package needs, is reserved for new methods. References are tokens in joint attention, which has only one other kind,
#: `cross`.
_LETTERS: Mapping[frozenset[Kind], str] = {
    NONE: "F",
    SELF: "S",
    DEEP: "D",
    CROSS: "P",
    CROSS | SELF: "Q",
    CROSS | DEEP: "R",
    TEMPORAL: "T",
    CROSS | TEMPORAL: "U",
    SELF | TEMPORAL: "V",
    CROSS | SELF | TEMPORAL: "Y",
    CROSS | SELF | DEEP: "Z",
    FF: "E",
    SELF | FF: "G",
    CROSS | SELF | FF: "H",
    CROSS | FF: "I",
    BLOCKS: "K",
    CROSS | BLOCKS: "L",
    REAR: "M",
    CROSS | REAR: "N",
    BLOCKS | REAR: "O",
    CROSS | BLOCKS | REAR: "J",
    REFERENCE: "X",
    CROSS | REFERENCE: "A",
}
#: The character of a step that computes the cond half in full, and estimates the prediction for the other half. It is
#: in lower case, like those of all steps with half the batch.
ESTIMATED = "w"
_NAMES: Mapping[frozenset[Kind], str] = {
    kinds: ", ".join(word for kind, word in _WORDS.items() if kind in kinds) or "full" for kinds in _LETTERS
}

#: The sets of kinds that a step may reuse, the common ones first.
REUSED: tuple[frozenset[Kind], ...] = tuple(_LETTERS)

#: The letters of steps that are decided at run time, by the kinds that they reuse and those that are decided.
_DECIDED: Mapping[tuple[frozenset[Kind], frozenset[Kind]], str] = {(NONE, BLOCKS): "B", (CROSS, BLOCKS): "C"}
_DECIDED_NAMES = {
    (reuse, decided): f"{_NAMES[reuse]} or {_NAMES[reuse | decided]}" for reuse, decided in _DECIDED
}  # fmt: skip

#: The kinds that steps that are decided at run time reuse, and those that are decided.
DECIDED: tuple[tuple[frozenset[Kind], frozenset[Kind]], ...] = tuple(_DECIDED)

#: The names of graphs, or of those that may serve a step, by the upper-case letters of a strip.
GRAPH_NAMES: Mapping[str, str] = {
    **{letter: _NAMES[kinds] for kinds, letter in _LETTERS.items()},
    **{letter: _DECIDED_NAMES[kinds] for kinds, letter in _DECIDED.items()},
    ESTIMATED.upper(): _NAMES[NONE],
}


@dataclass(frozen=True)
class Share:
    """The contribution of one method to a step; see `Phase` for the attributes."""

    emit: frozenset[Kind] = NONE
    merge: frozenset[Kind] = NONE
    reuse: frozenset[Kind] = NONE
    decided: frozenset[Kind] = NONE


@dataclass(frozen=True)
class Timeline:
    """The properties of a generation that a method can use to plan a step.

    Attributes:
        num_steps: the number of steps.
        starts: the steps at which the denoiser changes (0, the gate, the end of guidance). Methods that count steps
            restart there, because values cached before do not fit.
        in_full: the steps that must compute everything, because later steps reuse it.
        guided_steps: the number of steps with guidance.
    """

    num_steps: int
    starts: tuple[int, ...] = (0,)
    in_full: frozenset[int] = frozenset()
    guided_steps: int = 0

    def since_start(self, step: int) -> int:
        """Return the number of steps since the denoiser last changed."""
        return step - max(start for start in self.starts if start <= step)


#: A value at a range of blocks: the residual over it, the normalized and modulated input of its first attention, or the
#: embedding of the timestep that the blocks are modulated with.
ValueOfBlocks = Literal["residual", "modulated input", "time embedding"]


class Blocks(NamedTuple):
    """A range of the transformer blocks of a denoiser, as in the slice `blocks[start:stop]`.

    Blocks are numbered from 0 in the order in which they run; negative numbers count from the end. Where a UNet has
    several stacks of blocks, the range is taken of each. `value` is the value of the range that is cached, which for
    the kinds `blocks` and `rear` is always the residual.
    """

    start: int = 0
    stop: int | None = None
    value: ValueOfBlocks = "residual"


@dataclass(frozen=True)
class Method:
    """A caching method. To add one, add a file with a subclass to this folder; no other file has to change.

    A method is a frozen dataclass. Each of its fields becomes an option of the command line, `--KEY-FIELD`, with the
    help text from `option(default, help)`, and a value in schedule files.
    """

    #: The name of the method in files and options, in lower-case letters.
    key: ClassVar[str]
    #: The name of the method in tables and messages.
    title: ClassVar[str]
    #: Whether a model may lack some of the kinds. If so, the outputs of a joint attention, which is both cross- and
    #: self-attention, have the kind `self`.
    tolerant: ClassVar[bool] = False
    #: Whether the method estimates the unconditional prediction at some steps; see `estimates`.
    estimating: ClassVar[bool] = False

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of sites that some step reuses."""
        raise NotImplementedError

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        """The range of blocks for each of the kinds `blocks`, `rear` and `measured` that the method uses."""
        return {}

    @property
    def forecasts(self) -> Mapping[Kind, int]:
        """The order of the forecast for each kind whose reused values are forecast; see `forecast_weights`."""
        return {}

    @property
    def hidden_text(self) -> bool:
        """Whether the text's hidden states are cached, in joint attention, instead of its keys and values."""
        return False

    @property
    def rule(self) -> Rule | None:
        """The rule by which steps are decided at run time; None if the method has none."""
        return None

    def guided_steps(self, num_steps: int) -> int:
        """Return the number of steps after which the method ends guidance; `num_steps` if it does not."""
        return num_steps

    def gate(self, num_steps: int) -> int | None:
        """Return the first step of the gated phase; None if the method has no gate."""
        del num_steps
        return None

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        """Return the contribution of the method to `step`, which runs with or without guidance."""
        raise NotImplementedError

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        """Return everything that steps reusing these kinds may emit or merge for this method.

        One graph serves all steps that take the same inputs, so it emits all of these values at every step.
        """
        raise NotImplementedError

    def estimates(self, step: int, timeline: Timeline) -> bool:
        """Return whether `step`, which is guided, computes the cond half only and estimates the other prediction."""
        del step, timeline
        return False

    def frequency_weights(self, step: int, num_steps: int) -> tuple[float, float]:
        """Return the factors for the low and the high frequencies of the estimated difference at `step`."""
        del step, num_steps
        return 1.0, 1.0

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        """Return further settings of the method that `tune` tries."""
        return ()

    def __add__(self, other: Method | Schedule) -> Schedule:
        from tgate_compile.methods.schedule import Schedule

        return Schedule.of(self) + other

    def __str__(self) -> str:
        replaced = ("interval", "warm_up") if getattr(self, "mask", "") else ()
        chosen = [
            f"{f.name.replace('_', ' ')} {value}"
            for f in fields(self)
            if f.name not in replaced and (value := getattr(self, f.name)) not in (None, "", ())
        ]
        return f"{self.title} ({', '.join(chosen)})"


class Skipping(Method):
    """A method that computes its kinds at some steps only, and reuses or forecasts their values at the others.

    A subclass defines `kinds`, `skipped` and a field `forecast`. These determine the values that are kept for later
    steps.
    """

    #: The order of the forecast; 0 reuses the last value unchanged.
    forecast: int

    def skipped(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        """Return the kinds that are not computed at `step`, if values from earlier steps can be used there at all."""
        raise NotImplementedError

    @property
    def forecasts(self) -> Mapping[Kind, int]:
        return dict.fromkeys(self.kinds, self.forecast) if self.forecast else {}

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        return Share(emit=self._needed_later(step, timeline), reuse=self._reused(step, timeline))

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share(emit=self.kinds - reuse)

    def _reused(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        if step in timeline.in_full or timeline.since_start(step) == 0:
            return NONE
        return self.skipped(step, timeline)

    def _needed_later(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        """Return the kinds whose values at `step` are among the last ones when some later step reuses them."""
        end = min((start for start in timeline.starts if start > step), default=timeline.num_steps)
        needed: set[Kind] = set()
        for kind in self.kinds - self._reused(step, timeline):
            reused = [later for later in range(step + 1, end) if kind in self._reused(later, timeline)]
            if reused and reused[0] - step - 1 <= self.forecast:
                needed.add(kind)
        return frozenset(needed)


def check_skipping(method: Skipping, **counts: int) -> None:
    """Check the forecast of a method, and the fields named in `counts`: whole numbers, each with a smallest value."""
    for name, least in {**counts, "forecast": 0}.items():
        object.__setattr__(method, name, checked_count(getattr(method, name), name, least=least))
    if method.forecast > MAX_FORECAST:
        raise ConfigurationError(f"forecast must be an order from 0 to {MAX_FORECAST}, but got {method.forecast}.")


def check_mask(mask: object) -> None:
    """Check a mask of steps: a string of the digits 1 (compute) and 0 (skip); empty if there is none."""
    if not isinstance(mask, str) or not set(mask) <= {"0", "1"} or mask.startswith("0"):
        raise ConfigurationError(
            f'mask must be a string of the digits 0 and 1 that begins with 1, such as "1110101", but got {mask!r}.'
        )


def is_computed(step: int, timeline: Timeline, interval: int, warm_up: int = 1, mask: str = "") -> bool:
    """Return whether a method that computes its values at every `interval`-th step computes them at `step`.

    The first `warm_up` steps are all computed. Steps are counted from the last of them, or from the last step at which
    the denoiser changed, if that is later. A `mask` decides for each step instead; steps beyond its end are computed.
    """
    if mask:
        return mask[step : step + 1] != "0"
    start = step - timeline.since_start(step)
    since = step - max(start, warm_up - 1)
    return since <= 0 or since % interval == 0


#: The highest order of a forecast. Higher orders amplify small differences between the values.
MAX_FORECAST = 2


def forecast_weights(steps: Sequence[int], step: int) -> tuple[float, ...]:
    """Return the weights of the values of `steps`, newest first, whose weighted sum is the forecast for `step`.

    It is the Taylor expansion around the newest value, with differences of the values in place of derivatives
    (TaylorSeer, arXiv 2503.06923, section 3.2): `n` values give a forecast of order `n - 1`, so a single value is
    reused unchanged. The weights add up to 1.
    """
    # The differences of order j at the value i, as weights of the values.
    differences = [[float(i == j) for j in range(len(steps))] for i in range(len(steps))]
    weights = list(differences[0])
    for order in range(1, len(steps)):
        differences = [
            [
                (new - old) / (steps[i] - steps[i + 1])
                for new, old in zip(differences[i], differences[i + 1], strict=True)
            ]
            for i in range(len(differences) - 1)
        ]
        factor = (step - steps[0]) ** order / math.factorial(order)
        weights = [weight + factor * difference for weight, difference in zip(weights, differences[0], strict=True)]
    return tuple(weights)


def option(default: Any, text: str, *, least: int | None = None, is_gate: bool = False) -> Any:
    """Define a field of a method: its default, its help text on the command line, and its smallest valid number.

    With `is_gate`, it is a number or a fraction of the steps. A default of None stands for an optional whole number.
    """
    kind = int if default is None else type(default)
    return field(default=default, metadata={"help": text, "least": least, "type": kind, "is_gate": is_gate})


@cache
def methods() -> Mapping[str, type[Method]]:
    """Return the methods of this package, by key."""
    package = importlib.import_module(__package__ or "tgate_compile.methods")
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and "key" in vars(value):
                found[value.key] = value
    return found


def options_of(kind: type[Method]) -> dict[str, Field[Any]]:
    """Return the fields of a method by option name, such as `pab_cross_interval`."""
    return {f"{kind.key}_{f.name}": f for f in fields(kind)}


def steps_of(given: int | float | None, num_steps: int) -> int:
    """Return `given`, a number of steps or a fraction of `num_steps`, as a number of steps; None means all."""
    if given is None:
        return num_steps
    return max(1, round(given * num_steps)) if isinstance(given, float) else given


def checked_gate_step(given: object, name: str = "gate_step") -> int | float:
    """Return `given` as a plain int (steps) or float (fraction).

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


def checked_count(given: object, name: str, *, least: int) -> int:
    """Return `given` as an int.

    Raises:
        ConfigurationError: it is not a whole number of at least `least`.
    """
    if isinstance(given, bool) or not hasattr(given, "__index__") or given.__index__() < least:
        raise ConfigurationError(MSG_COUNT.format(name=name, least=least, given=given))
    return int(given.__index__())


def checked_number(given: object, name: str) -> float:
    """Return `given` as a float.

    Raises:
        ConfigurationError: it is not a finite number.
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        try:
            number = float(given)
        except OverflowError:  # an int too large for a float
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigurationError(f"{name} must be a number, but got {given!r}.")
