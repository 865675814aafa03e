"""FORA: compute attention and feed-forward outputs at every n-th step only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile.methods.method import (
    CROSS,
    FF,
    NONE,
    SELF,
    Kind,
    Method,
    Skipping,
    Timeline,
    check_mask,
    check_skipping,
    is_computed,
    option,
)


@dataclass(frozen=True)
class Fora(Skipping):
    """Fast-Forward Caching (FORA, arXiv 2407.01425, section 3.2, static).

    The outputs of all attentions and feed-forward modules are computed at every `interval`-th step, and reused in
    between; norms, gates and the timestep's modulation are computed at every step. The count restarts where the
    denoiser changes (at a gate, and where guidance ends).

    With a `forecast`, the outputs are extrapolated instead, as in TaylorSeer (arXiv 2503.06923), which also computes
    the first steps: `Fora(5, warm_up=3, forecast=2)`.

    Attributes:
        interval: the number of steps from one computation to the next.
        warm_up: the number of steps at the beginning that are all computed.
        mask: instead of `interval` and `warm_up`: one digit per step, `1` to compute and `0` to skip, such as
            `"1110101"`. Steps beyond its end are computed.
        forecast: the order of the forecast: 0 reuses the last outputs, 1 and 2 extrapolate them (TaylorSeer).
    """

    key: ClassVar[str] = "fora"
    title: ClassVar[str] = "FORA"
    tolerant: ClassVar[bool] = True

    interval: int = option(3, "Compute attention and feed-forward outputs at every n-th step only.", least=2)
    warm_up: int = option(1, "The number of steps at the beginning that are computed.", least=1)
    mask: str = option("", "A digit per step, 1 to compute the outputs and 0 to skip, instead of an interval.")
    forecast: int = option(0, "The order of the forecast of skipped outputs: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_skipping(self, interval=2, warm_up=1)
        check_mask(self.mask)

    @property
    def kinds(self) -> frozenset[Kind]:
        return CROSS | SELF | FF

    def skipped(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        return NONE if is_computed(step, timeline, self.interval, self.warm_up, self.mask) else self.kinds

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        return (cls(2), cls(3, forecast=1))
