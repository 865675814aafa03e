"""What a caching method is: for each step of a generation, the values it computes, hands on and reuses."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from tgate_compile.methods.schedule import Schedule

#: What can be cached: the outputs of cross-attentions, of self-attentions (of the temporal ones among them apart, for
#: methods that ask for this kind), and the deep feature of a UNet (DeepCache).
Kind = Literal["cross", "self", "temporal", "deep"]

#: One of the two predictions of classifier-free guidance.
Half = Literal["uncond", "cond"]

NONE: frozenset[Kind] = frozenset()
CROSS: frozenset[Kind] = frozenset({"cross"})
SELF: frozenset[Kind] = frozenset({"self"})
TEMPORAL: frozenset[Kind] = frozenset({"temporal"})
DEEP: frozenset[Kind] = frozenset({"deep"})

MSG_GATE_STEP = (
    "{name} must be a whole number of steps, at least 1 (10: ten steps in full), or a fraction of the "
    "steps strictly between 0 and 1 (0.4: the first 40 %), but got {given!r}."
)
MSG_COUNT = "{name} must be a whole number, at least {least}, but got {given!r}."


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
    emit: frozenset[Kind] = NONE
    merge: frozenset[Kind] = NONE
    reuse: frozenset[Kind] = NONE

    @property
    def name(self) -> str:
        """The name of the phase's graph in descriptions."""
        return _NAMES[self.reuse]

    @property
    def character(self) -> str:
        """The phase in a strip: a capital letter under guidance."""
        letter = _LETTERS[self.reuse]
        return letter if self.guided else letter.lower()


#: What a graph is called that reuses values of a kind, in this order. "cross" alone has its weights pruned.
_WORDS: Mapping[Kind, str] = {
    "cross": "pruned",
    "self": "self-reused",
    "temporal": "temporal-reused",
    "deep": "shallow",
}
_SUBSETS = [frozenset(kinds) for count in range(len(_WORDS) + 1) for kinds in combinations(get_args(Kind), count)]
_NAMES: Mapping[frozenset[Kind], str] = {
    kinds: ", ".join(word for kind, word in _WORDS.items() if kind in kinds) or "full" for kinds in _SUBSETS
}
_FIRST_LETTERS: Mapping[frozenset[Kind], str] = {
    NONE: "F",
    SELF: "S",
    DEEP: "D",
    CROSS: "P",
    CROSS | SELF: "Q",
    CROSS | DEEP: "R",
    TEMPORAL: "T",
}
#: Every set of reused kinds has a letter: those above, and the rest of the alphabet in order.
_LETTERS: Mapping[frozenset[Kind], str] = {
    **_FIRST_LETTERS,
    **dict(
        zip(
            [kinds for kinds in _SUBSETS if kinds not in _FIRST_LETTERS],
            [letter for letter in "UVWXYZABCEGHIJ" if letter not in _FIRST_LETTERS.values()],
            strict=False,
        )
    ),
}

#: The sets of kinds that a step may reuse, the common ones first.
REUSED: tuple[frozenset[Kind], ...] = tuple(_LETTERS)

#: What the letters of a strip mean, capital ones.
GRAPH_NAMES: Mapping[str, str] = {letter: _NAMES[kinds] for kinds, letter in _LETTERS.items()}


@dataclass(frozen=True)
class Share:
    """What one method contributes to a step; see `Phase`."""

    emit: frozenset[Kind] = NONE
    merge: frozenset[Kind] = NONE
    reuse: frozenset[Kind] = NONE


@dataclass(frozen=True)
class Timeline:
    """What a method knows of the generation when it is asked about a step.

    Attributes:
        num_steps: of the generation.
        starts: steps at which the denoiser changes (0, the gate, the end of guidance); methods that count steps
            begin anew there, because what was cached before does not fit.
        in_full: steps that must compute everything, because a later one takes all from them.
    """

    num_steps: int
    starts: tuple[int, ...] = (0,)
    in_full: frozenset[int] = frozenset()

    def since_start(self, step: int) -> int:
        """Return how many steps ago the denoiser last changed."""
        return step - max(start for start in self.starts if start <= step)


@dataclass(frozen=True)
class Method:
    """A caching method. A new one is a file in this folder with a subclass; nothing else has to be told.

    A method is a frozen dataclass. Each of its fields is also an option of the command line, `--KEY-FIELD`, with the
    help that `option(default, help)` gives it, and a value in schedule files.
    """

    #: The method in files and options: lower-case letters.
    key: ClassVar[str]
    #: The method in tables.
    title: ClassVar[str]

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of site that some step reuses."""
        raise NotImplementedError

    def guided_steps(self, num_steps: int) -> int:
        """Return after how many steps the method ends guidance; `num_steps` if it does not."""
        return num_steps

    def gate(self, num_steps: int) -> int | None:
        """Return the first step of the gated phase; None if the method has no gate."""
        del num_steps
        return None

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        """Return what the method does at `step`, which runs under guidance or not."""
        raise NotImplementedError

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        """Return all that any step may emit or merge for this method that reuses these kinds.

        One graph serves all steps that take the same inputs, so it hands on all of it, at every step.
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        """Return settings that `tune` tries beside its own."""
        return ()

    def __add__(self, other: Method | Schedule) -> Schedule:
        from tgate_compile.methods.schedule import Schedule

        return Schedule.of(self) + other

    def __str__(self) -> str:
        chosen = [f"{f.name.replace('_', ' ')} {value}" for f in fields(self) if (value := getattr(self, f.name))]
        return f"{self.title} ({', '.join(chosen)})"


def option(default: Any, text: str, *, least: int | None = None) -> Any:
    """Define a field of a method: its default, its help on the command line, and the least number that it takes."""
    return field(default=default, metadata={"help": text, "least": least})


@cache
def methods() -> Mapping[str, type[Method]]:
    """Return the methods of this package, by their keys."""
    package = importlib.import_module(__package__ or "tgate_compile.methods")
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value is not Method:
                found[value.key] = value
    return found


def options_of(kind: type[Method]) -> dict[str, Field[Any]]:
    """Return the fields of a method, by the names of their options: `pab_cross_interval`."""
    return {f"{kind.key}_{f.name}": f for f in fields(kind)}


def steps_of(given: int | float | None, num_steps: int) -> int:
    """Return a number of steps, given as that or as a fraction of `num_steps`; None means all."""
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
        ConfigurationError: it is not a whole number, or less than `least`.
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
        except OverflowError:  # an int beyond all floats
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigurationError(f"{name} must be a number, but got {given!r}.")
