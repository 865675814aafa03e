"""What is evaluated: the plain pipeline, schedules, and fewer steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tgate_compile._errors import ConfigurationError
from tgate_compile._schedule import Schedule
from tgate_compile._tuning.request import is_whole

PLAIN = "plain"

MSG_SCHEDULES = (
    "schedules must be a sequence, or a mapping from labels, of tgate_compile.Schedule or numbers of steps of the "
    "plain pipeline, at least one, but got {given!r}."
)
MSG_LABELS = "The labels {first!r} and {second!r} are too much alike to name files by. Give others."


@dataclass(frozen=True)
class Contender:
    """One row of an evaluation.

    Attributes:
        label: what it is called.
        schedule: None for the plain pipeline.
        steps: inference steps.
    """

    label: str
    schedule: Schedule | None
    steps: int

    @property
    def file_name(self) -> str:
        """The label, as far as file names take it."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.") or "contender"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {"schedule": None if self.schedule is None else asdict(self.schedule), "steps": self.steps}


Given = Mapping[str, Schedule | int] | Sequence[Schedule | int]


def contenders_of(given: Given, num_inference_steps: int) -> tuple[Contender, ...]:
    """The plain pipeline, then what is given.

    Raises:
        ConfigurationError: something else is given, or labels are too much alike.
    """
    if isinstance(given, Mapping):
        items = list(given.items())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        items = [(str(item) if isinstance(item, Schedule) else f"{item} steps", item) for item in given]
    else:
        items = []
    if not items or not all(isinstance(label, str) and label.strip() and _is_known(item) for label, item in items):
        raise ConfigurationError(MSG_SCHEDULES.format(given=given))
    contenders = [Contender(PLAIN, None, num_inference_steps)]
    for label, item in items:
        schedule = item if isinstance(item, Schedule) else None
        contenders.append(Contender(label, schedule, num_inference_steps if isinstance(item, Schedule) else item))
    names: dict[str, str] = {}
    for contender in contenders:
        other = names.setdefault(contender.file_name, contender.label)
        if other != contender.label or (contender.label == PLAIN and contender is not contenders[0]):
            raise ConfigurationError(MSG_LABELS.format(first=other, second=contender.label))
    return tuple(dict.fromkeys(contenders))


def _is_known(item: object) -> bool:
    return isinstance(item, Schedule) or (is_whole(item) and item >= 1)  # type: ignore[operator]
