"""FasterCache's guidance part: estimate the unconditional prediction at most steps instead of computing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import NONE, Kind, Method, Share, Timeline, checked_count, checked_number, option


@dataclass(frozen=True)
class FasterCache(Method):
    """The CFG-Cache of FasterCache (arXiv 2410.19355, section 3.3, equations 9 to 11).

    Late in a generation, the predictions for the prompt and for the negative prompt hardly differ, and their difference
    changes slowly. So the unconditional prediction is computed at every `interval`-th step only. At the other steps,
    the denoiser runs on the prompt's half alone, and the unconditional prediction is estimated: the last known
    difference is added to the prediction for the prompt. At each of these steps, the low and the high spatial
    frequencies of the difference are multiplied by their weights once more. The guidance scale stays in effect.

    The other part of FasterCache, which computes attention outputs at intervals, corresponds to `PAB`.

    Attributes:
        interval: the number of steps from one computation of the unconditional prediction to the next. It is computed
            at the steps whose number, from 0, is a multiple of this.
        begin: the fraction of the steps, at the beginning, at which it is always computed. diffusers' timesteps
            (-1, 641) of 1000 correspond to 0.36.
        low_weight: the weight of the low frequencies of the difference until `low_end`; afterwards it is 1.
        low_end: the fraction of the steps up to which `low_weight` applies; diffusers' (99, 901) corresponds to 0.9.
        high_weight: the weight of the high frequencies of the difference from `high_begin` on; before, it is 1.
        high_begin: the fraction of the steps from which `high_weight` applies; diffusers' (-1, 301) corresponds to 0.7.
    """

    key: ClassVar[str] = "fastercache"
    title: ClassVar[str] = "FasterCache"
    estimating: ClassVar[bool] = True

    interval: int = option(5, "Compute the unconditional prediction at every n-th step only.", least=2)
    begin: float = option(0.36, "The fraction of the steps, at the beginning, at which it is always computed.")
    low_weight: float = option(1.1, "The weight of low frequencies at each estimated step.")
    low_end: float = option(0.9, "The fraction of the steps up to which low frequencies have this weight.")
    high_weight: float = option(1.1, "The weight of high frequencies at each estimated step.")
    high_begin: float = option(0.7, "The fraction of the steps from which high frequencies have this weight.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", checked_count(self.interval, "interval", least=2))
        for name in ("begin", "low_weight", "low_end", "high_weight", "high_begin"):
            object.__setattr__(self, name, checked_number(getattr(self, name), name))
        for name in ("begin", "low_end", "high_begin"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(
                    f"{name} of FasterCache must be a fraction of the steps, 0 to 1, but got {getattr(self, name)}."
                )

    @property
    def kinds(self) -> frozenset[Kind]:
        return NONE

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        return Share()

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share()

    def estimates(self, step: int, timeline: Timeline) -> bool:
        if step in timeline.in_full or timeline.since_start(step) == 0:
            return False
        return step >= round(self.begin * timeline.num_steps) and step % self.interval != 0

    def frequency_weights(self, step: int, num_steps: int) -> tuple[float, float]:
        low = self.low_weight if step < round(self.low_end * num_steps) else 1.0
        return low, self.high_weight if step >= round(self.high_begin * num_steps) else 1.0
