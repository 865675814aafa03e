"""MagCache: skip a transformer's blocks at the steps where their effect is known to change little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    BLOCKS,
    NONE,
    Blocks,
    Kind,
    Skipping,
    Timeline,
    check_skipping,
    checked_number,
    option,
)


@dataclass(frozen=True)
class MagCache(Skipping):
    """MagCache (arXiv 2506.09045, section 3.2, algorithm 1).

    The residual over all blocks (output minus input) is reused at steps at which its magnitude is known to stay about
    the same. The ratios between the magnitudes of successive steps hardly depend on the prompt, so they are measured
    once for a model, and determine in advance which steps to skip. Each step multiplies the ratios of all steps since
    the last computed one, and adds the product's absolute difference from 1 to a sum, which must not exceed
    `threshold`.

    Attributes:
        ratios: for each step, the mean magnitude of the residual relative to that of the step before; the first is 1.
            With another number of steps, the nearest step's ratio is used. `tgate_compile.calibrate_mag_cache` measures
            them, as diffusers' `MagCacheConfig(calibrate=True)` does.
        threshold: the largest sum of differences at which blocks are still skipped.
        most_skipped: the largest number of steps to skip in a row.
        retention: the fraction of the steps, at the beginning, that are all computed.
        front: the number of blocks at the front that are computed at every step; the paper skips all blocks.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "magcache"
    title: ClassVar[str] = "MagCache"

    ratios: tuple[float, ...] = option((), "The ratio of each step, separated by commas.")
    threshold: float = option(0.06, "The largest accumulated difference at which blocks are skipped.")
    most_skipped: int = option(3, "The largest number of steps to skip in a row.", least=1)
    retention: float = option(0.2, "The fraction of the steps, at the beginning, that are all computed.")
    front: int = option(0, "The number of blocks at the front that every step computes.", least=0)
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_skipping(self, most_skipped=1, front=0)
        if not isinstance(self.ratios, (list, tuple)) or not self.ratios:
            raise ConfigurationError(
                f"MagCache needs the ratios of the model, one number for each step, but got {self.ratios!r}. Measure "
                "them once: tgate_compile.calibrate_mag_cache(pipe, prompts) returns MagCache with them."
            )
        object.__setattr__(self, "ratios", tuple(checked_number(ratio, "each of the ratios") for ratio in self.ratios))
        for name in ("threshold", "retention"):
            object.__setattr__(self, name, checked_number(getattr(self, name), name))
        if self.threshold < 0 or not 0.0 <= self.retention <= 1.0:
            raise ConfigurationError(
                "MagCache needs a threshold of at least 0, and a retention between 0 and 1, but got "
                f"{self.threshold} and {self.retention}."
            )

    @property
    def kinds(self) -> frozenset[Kind]:
        return BLOCKS

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        return {"blocks": Blocks(self.front)}

    def thresholds(self) -> tuple[MagCache, ...]:
        """Return the method with the thresholds that `tune` tries: the default, and two that skip more steps."""
        return tuple(replace(self, threshold=threshold) for threshold in (0.06, 0.12, 0.24))

    def __str__(self) -> str:
        fields = [f"threshold {self.threshold:g}", f"ratios of {len(self.ratios)} steps"]
        others = {"most skipped": (self.most_skipped, 3), "retention": (self.retention, 0.2), "front": (self.front, 0)}
        others["forecast"] = self.forecast, 0
        fields += [f"{name} {value:g}" for name, (value, default) in others.items() if value != default]
        return f"{self.title} ({', '.join(fields)})"

    def skipped(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        return BLOCKS if step in _skipped_steps(self, timeline) else NONE


@cache
def _skipped_steps(method: MagCache, timeline: Timeline) -> frozenset[int]:
    retained = int(method.retention * timeline.num_steps + 0.5)
    skipped: set[int] = set()
    product, difference, count = 1.0, 0.0, 0
    for step in range(retained, timeline.num_steps):
        product *= _ratio(method.ratios, step, timeline.num_steps)
        difference += abs(1.0 - product)
        count += 1
        must_compute = step in timeline.in_full or timeline.since_start(step) == 0
        if must_compute or difference > method.threshold or count > method.most_skipped:
            product, difference, count = 1.0, 0.0, 0
        else:
            skipped.add(step)
    return frozenset(skipped)


def _ratio(ratios: tuple[float, ...], step: int, num_steps: int) -> float:
    """Return the ratio of the step that is nearest to `step` of `num_steps`."""
    if num_steps == 1:
        return ratios[-1]
    return ratios[round(step * (len(ratios) - 1) / (num_steps - 1))]
