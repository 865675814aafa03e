"""DBCache: skip the middle blocks while the effect of the first ones hardly changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.decisions import Deciding, Rule, check_deciding
from tgate_compile.methods.method import Blocks, Kind, Timeline, check_mask, checked_number, option


@dataclass(frozen=True)
class DBCache(Deciding):
    """Dual block cache (DBCache in cache-dit, whose defaults these are).

    The first `front` and the last `back` blocks of the transformer are computed at every step. If the residual over
    the front blocks differs from that of the last computed step by less than `threshold` (mean absolute difference,
    relative to the mean absolute value), the blocks in the middle are skipped, and their last residual is added to the
    output of the front blocks. With guidance in one batch, there is one decision for both halves; if each half has its
    own denoiser call, each has its own decision.

    Attributes:
        threshold: the relative change below which the middle blocks are skipped (`residual_diff_threshold`).
        front: the number of blocks at the front that are computed at every step (`Fn_compute_blocks`).
        back: the number of blocks at the end that are computed at every step (`Bn_compute_blocks`).
        warm_up: the number of steps at the beginning that compute all blocks (`max_warmup_steps`).
        most_in_row: the largest number of steps to skip in a row (`max_continuous_cached_steps`); None if there is no
            limit.
        most_skipped: the largest number of steps to skip in a generation (`max_cached_steps`); None if there is no
            limit.
        mask: instead of `warm_up`: one digit per step, `1` to compute all blocks and `0` to decide, such as
            `"1110101"` (`steps_computation_mask`). Steps beyond its end are decided. For a mask whose `0` always skips,
            use `BlockCache`.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "dbcache"
    title: ClassVar[str] = "DBCache"

    threshold: float = option(0.08, "Skip the middle blocks while the change of the front blocks' residual is smaller.")
    front: int = option(8, "The number of blocks at the front that every step computes.", least=1)
    back: int = option(0, "The number of blocks at the end that every step computes.", least=0)
    warm_up: int = option(8, "The number of steps at the beginning that compute all blocks.", least=1)
    most_in_row: int | None = option(None, "The largest number of steps to skip in a row.", least=1)
    most_skipped: int | None = option(None, "The largest number of steps to skip in a generation.", least=1)
    mask: str = option("", "A digit per step, 1 to compute all blocks and 0 to decide, instead of a warm-up.")
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_deciding(self, front=1, back=0, warm_up=1, most_in_row=1, most_skipped=1)
        check_mask(self.mask)
        if self.threshold >= 1.0:
            raise ConfigurationError(
                f"DBCache needs a threshold between 0 and 1, but got {self.threshold}. To skip at fixed steps, use "
                "BlockCache."
            )

    @property
    def rule(self) -> Rule:
        threshold = checked_number(self.threshold, "threshold")
        return Rule(threshold, most_in_row=self.most_in_row, most=self.most_skipped)

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        return {"blocks": Blocks(self.front, -self.back or None), "measured": Blocks(0, self.front)}

    def must_compute(self, step: int, timeline: Timeline) -> bool:
        return self.mask[step : step + 1] == "1" if self.mask else step < self.warm_up
