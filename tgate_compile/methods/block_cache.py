"""Block cache: compute the middle blocks of a transformer at some steps only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile.methods.method import (
    BLOCKS,
    NONE,
    Blocks,
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
class BlockCache(Skipping):
    """The static form of first-block caching (ParaAttention) and of DBCache (cache-dit, with its mask of steps).

    The first `front` and the last `back` blocks of the transformer are computed at every step. The blocks between them
    are computed only at the steps that an interval or a mask selects in advance. At the other steps, their last
    residual (output minus input) is added to their present input.

    In a UNet, this applies to each stack of transformer blocks by itself: use `front=0`.

    Attributes:
        interval: the number of steps from one computation to the next.
        front: the number of blocks at the front that are computed at every step.
        back: the number of blocks at the end that are computed at every step.
        warm_up: the number of steps at the beginning that are all computed.
        mask: instead of `interval` and `warm_up`: one digit per step, `1` to compute all blocks and `0` to skip those
            in the middle, such as `"1110101"`. Steps beyond its end are computed.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "blockcache"
    title: ClassVar[str] = "Block cache"

    interval: int = option(2, "Compute the middle blocks at every n-th step only.", least=2)
    front: int = option(1, "The number of blocks at the front that every step computes.", least=0)
    back: int = option(0, "The number of blocks at the end that every step computes.", least=0)
    warm_up: int = option(1, "The number of steps at the beginning that compute all blocks.", least=1)
    mask: str = option("", "A digit per step, 1 to compute all blocks and 0 to skip, instead of an interval.")
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_skipping(self, interval=2, front=0, back=0, warm_up=1)
        check_mask(self.mask)

    @property
    def kinds(self) -> frozenset[Kind]:
        return BLOCKS

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        return {"blocks": Blocks(self.front, -self.back or None)}

    def skipped(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        return NONE if is_computed(step, timeline, self.interval, self.warm_up, self.mask) else BLOCKS

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        return (cls(2), cls(3, forecast=1))
