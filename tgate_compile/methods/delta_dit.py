"""Delta-DiT: skip the rear blocks of a transformer in the early steps, and its front blocks in the late ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    BLOCKS,
    NONE,
    REAR,
    Blocks,
    Kind,
    Skipping,
    Timeline,
    check_skipping,
    checked_number,
    is_computed,
    option,
)


@dataclass(frozen=True)
class DeltaDiT(Skipping):
    """Delta-DiT (arXiv 2406.01125, section 3.3).

    A diffusion transformer draws outlines first, with its front blocks, and details later, with its rear blocks.
    Therefore the rear blocks are computed at every `interval`-th step only in the early steps, and the front blocks in
    the late steps. In between, the last residual of these blocks (output minus input) is added to their present input.
    Both counts start at a step that computes everything.

    Attributes:
        interval: the number of steps from one computation of the skipped blocks to the next.
        blocks: the number of blocks that are skipped, at the front and at the rear.
        boundary: the fraction of the steps after which the front blocks are skipped instead of the rear ones.
        forecast: the order of the forecast: 0 reuses the last residual, 1 and 2 extrapolate it (TaylorSeer).
    """

    key: ClassVar[str] = "deltadit"
    title: ClassVar[str] = "Delta-DiT"

    interval: int = option(2, "Compute the skipped blocks at every n-th step.", least=2)
    blocks: int = option(8, "The number of blocks to skip, at the front and at the rear.", least=1)
    boundary: float = option(0.5, "The fraction of the steps after which front blocks are skipped.")
    forecast: int = option(0, "The order of the forecast of skipped blocks: 0, 1 or 2.", least=0)

    def __post_init__(self) -> None:
        check_skipping(self, interval=2, blocks=1)
        object.__setattr__(self, "boundary", checked_number(self.boundary, "boundary"))
        if not 0.0 <= self.boundary <= 1.0:
            raise ConfigurationError(f"boundary must be a fraction of the steps, 0 to 1, but got {self.boundary}.")

    @property
    def kinds(self) -> frozenset[Kind]:
        return BLOCKS | REAR

    @property
    def ranges(self) -> Mapping[Kind, Blocks]:
        return {"blocks": Blocks(0, self.blocks), "rear": Blocks(-self.blocks)}

    def skipped(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        boundary = round(self.boundary * timeline.num_steps)
        if step < boundary:
            return NONE if is_computed(step, timeline, self.interval) else REAR
        return NONE if is_computed(step, timeline, self.interval, boundary + 1) else BLOCKS
