"""Curves over the steps: a mean and a spread over images, added up one image at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A quantity at some steps.

    Attributes:
        steps: the steps.
        mean: over images, at each of them.
        spread: the standard deviation.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]


class Tallies:
    """Curves in the making. Only sums are kept: a thousand prompts take no more room than one."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))

    def add(self, key: Hashable, step: int, value: float) -> None:
        """One image's value of `key` at a step."""
        sums = self._sums[key][step]
        sums[0] += 1
        sums[1] += value
        sums[2] += value * value

    def add_means(self, key: Hashable, values: Mapping[int, Iterable[float]]) -> None:
        """One image's mean of several values at each step."""
        for step, of_step in values.items():
            numbers = list(of_step)
            self.add(key, step, math.fsum(numbers) / len(numbers))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums

    def curve(self, key: Hashable) -> Curve:
        """The curve of `key`; an empty one if nothing has been added to it."""
        by_step = self._sums.get(key, {})
        steps = tuple(sorted(by_step))
        means = tuple(by_step[step][1] / by_step[step][0] for step in steps)
        squares = (by_step[step][2] / by_step[step][0] for step in steps)
        spreads = tuple(math.sqrt(max(s - m * m, 0.0)) for s, m in zip(squares, means, strict=True))
        return Curve(steps, means, spreads)
