"""Steps that are decided at run time: the rule, its state during a generation, and the methods that use one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    BLOCKS,
    MAX_FORECAST,
    MEASURED,
    Kind,
    Method,
    Share,
    Timeline,
    checked_count,
    checked_number,
)


@dataclass(frozen=True)
class Rule:
    """The rule that decides a step by its measure, the relative change of a value since an earlier step.

    The measure is `mean(abs(value - before)) / mean(abs(before))`, over the whole batch.

    Attributes:
        threshold: the blocks are skipped while the measure is below this.
        at_threshold: whether they are also skipped if the measure equals the threshold.
        coefficients: the coefficients, highest power first, of a polynomial that is applied to the measure; empty if
            the measure is used unchanged.
        accumulates: whether the measures of all steps since the last computed one are added up.
        since: the step that the value is compared with: the last one whose blocks were computed, or the previous one.
        most_in_row: the largest number of steps to skip in a row; None if there is no limit.
        most: the largest number of steps to skip in a generation; None if there is no limit.
    """

    threshold: float
    at_threshold: bool = False
    coefficients: tuple[float, ...] = ()
    accumulates: bool = False
    since: Literal["computed", "previous"] = "computed"
    most_in_row: int | None = None
    most: int | None = None


class Decider:
    """Decides the steps of one generation, or of one guidance half in it, in order."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._total = 0.0
        self._in_row = 0
        self._skipped = 0

    def skips(self, measure: float) -> bool:
        """Return whether to skip the blocks of a step with this measure. If it is NaN, they are computed."""
        rule = self._rule
        if rule.coefficients:
            measure = _polynomial(rule.coefficients, measure)
        if rule.accumulates:
            self._total += measure
            measure = self._total
        skipped = (
            (measure < rule.threshold or (rule.at_threshold and measure == rule.threshold))
            and (rule.most_in_row is None or self._in_row < rule.most_in_row)
            and (rule.most is None or self._skipped < rule.most)
        )
        if not skipped:
            self.computed()
            return False
        self._in_row += 1
        self._skipped += 1
        return True

    def computed(self) -> None:
        """Note that a step has been computed."""
        self._total = 0.0
        self._in_row = 0


def _polynomial(coefficients: tuple[float, ...], at: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * at + coefficient
    return value


class Deciding(Method):
    """A method that decides at run time whether the middle blocks of a transformer are computed or skipped.

    A subclass defines `rule`, `ranges` with the kinds `blocks` and `measured`, `must_compute`, and the fields
    `threshold` and `forecast`.
    """

    #: The measure at which the decision changes.
    threshold: float
    #: The order of the forecast of skipped blocks; 0 reuses the last residual unchanged.
    forecast: int

    @property
    def kinds(self) -> frozenset[Kind]:
        return BLOCKS

    @property
    def rule(self) -> Rule:
        raise NotImplementedError

    @property
    def forecasts(self) -> Mapping[Kind, int]:
        return {"blocks": self.forecast} if self.forecast else {}

    def must_compute(self, step: int, timeline: Timeline) -> bool:
        """Return whether the blocks are computed at `step` in any case."""
        raise NotImplementedError

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        if not self._is_computed(step, timeline):
            return Share(decided=BLOCKS)
        end = min((start for start in timeline.starts if start > step), default=timeline.num_steps)
        is_needed = not all(self._is_computed(later, timeline) for later in range(step + 1, end))
        return Share(emit=BLOCKS | MEASURED) if is_needed else Share()

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share(emit=BLOCKS | MEASURED)

    def _is_computed(self, step: int, timeline: Timeline) -> bool:
        is_start = step in timeline.in_full or timeline.since_start(step) == 0
        return is_start or self.must_compute(step, timeline)


def check_deciding(method: Deciding, **counts: int) -> None:
    """Check the threshold and forecast of a method, and the fields named in `counts`.

    Each of these is None, or a whole number of at least the given value.
    """
    object.__setattr__(method, "threshold", checked_number(method.threshold, "threshold"))
    if method.threshold <= 0.0:
        raise ConfigurationError(f"threshold must be above 0, but got {method.threshold}.")
    for name, least in {**counts, "forecast": 0}.items():
        if getattr(method, name) is not None:
            object.__setattr__(method, name, checked_count(getattr(method, name), name, least=least))
    if method.forecast > MAX_FORECAST:
        raise ConfigurationError(f"forecast must be an order from 0 to {MAX_FORECAST}, but got {method.forecast}.")
