"""Pyramid Attention Broadcast: compute attention outputs at intervals, within a window of the steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    NONE,
    Kind,
    Method,
    Share,
    Timeline,
    checked_count,
    checked_number,
    option,
)


@dataclass(frozen=True)
class PAB(Method):
    """Pyramid Attention Broadcast (arXiv 2408.12588, section 3.2).

    Between `begin` and `end`, attention outputs are computed at intervals and reused in between; outside of this window
    everything is computed. The paper reuses cross-attention longest and spatial attention shortest:
    `PAB(cross_interval=6, self_interval=2, temporal_interval=4)` for video models.

    An interval is the number of steps from one computation to the next; 1 computes the attention at every step.

    Attributes:
        cross_interval: the interval of cross-attention.
        self_interval: the interval of self-attention, or of spatial self-attention if `temporal_interval` is above 1.
        temporal_interval: the interval of self-attention between the frames of a video.
        begin: the fraction of the steps after which the window begins. diffusers' timesteps (100, 800) of 1000
            correspond to about (0.2, 0.9).
        end: the fraction of the steps after which the window ends.
    """

    key: ClassVar[str] = "pab"
    title: ClassVar[str] = "PAB"

    cross_interval: int = option(6, "Compute cross-attention at every n-th step only.", least=1)
    self_interval: int = option(2, "Compute self-attention (spatial, in videos) at every n-th step only.", least=1)
    temporal_interval: int = option(1, "Compute attention between frames at every n-th step only.", least=1)
    begin: float = option(0.2, "The fraction of the steps after which the window begins.")
    end: float = option(0.9, "The fraction of the steps after which the window ends.")

    def __post_init__(self) -> None:
        for name in ("cross_interval", "self_interval", "temporal_interval"):
            object.__setattr__(self, name, checked_count(getattr(self, name), name, least=1))
        for name in ("begin", "end"):
            object.__setattr__(self, name, checked_number(getattr(self, name), name))
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ConfigurationError(f"PAB needs 0 <= begin < end <= 1, but got {self.begin} and {self.end}.")
        if not self.kinds:
            raise ConfigurationError("PAB with every interval at 1 caches nothing; set one of them to at least 2.")

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(kind for kind, interval in self._intervals.items() if interval > 1)

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        reuse = self._reused(step, timeline)
        return Share(emit=self._reused(step + 1, timeline) - reuse, reuse=reuse)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share(emit=self.kinds - reuse)

    @classmethod
    def candidates(cls) -> Iterable[Method]:
        return (cls(6, 2), cls(6, 1), cls(1, 2))

    @property
    def _intervals(self) -> dict[Kind, int]:
        return {"cross": self.cross_interval, "self": self.self_interval, "temporal": self.temporal_interval}

    def _reused(self, step: int, timeline: Timeline) -> frozenset[Kind]:
        window = range(round(self.begin * timeline.num_steps), round(self.end * timeline.num_steps))
        if step not in window or step in timeline.in_full:
            return NONE
        since = timeline.since_start(step)
        return frozenset(kind for kind in self.kinds if since % self._intervals[kind] != 0)
