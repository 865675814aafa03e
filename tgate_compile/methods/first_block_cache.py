"""First-block cache: skip the other blocks while the effect of the first one hardly changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile.methods.decisions import Deciding, Rule, check_deciding
from tgate_compile.methods.method import Blocks, Kind, Method, Timeline, checked_number, option


@dataclass(frozen=True)
class FirstBlockCache(Deciding):
    """First-block cache (ParaAttention; `FirstBlockCacheConfig` in diffusers).

    The first block of the transformer is computed at every step. If its residual differs from that of the last
    computed step by at most `threshold` (mean absolute difference, relative to the mean absolute value), the other
    blocks are skipped, and their last residual is added to the output of the first block. With guidance in one batch,
    there is one decision for both halves; if each half has its own denoiser call, each has its own decision.

    Attributes:
        threshold: the largest relative change of the first block's residual at which the other blocks are skipped.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "firstblock"
    title: ClassVar[str] = "First-block cache"

    threshold: float = option(0.05, "Skip the other blocks if the first block's residual changes by at most this.")
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_deciding(self)

    @property
    def rule(self) -> Rule:
        return Rule(checked_number(self.threshold, "threshold"), at_threshold=True)

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        return {"blocks": Blocks(1), "measured": Blocks(0, 1)}

    def must_compute(self, step: int, timeline: Timeline) -> bool:
        return False

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        return (cls(0.05), cls(0.1))
