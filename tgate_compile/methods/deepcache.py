"""DeepCache: compute a UNet's deep layers at every n-th step only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile.methods.method import DEEP, Kind, Method, Share, Timeline, checked_count, option


@dataclass(frozen=True)
class DeepCache(Method):
    """DeepCache (arXiv 2312.00858, section 3.3, uniform).

    All but the outermost layers of a UNet are computed at every `interval`-th step only. The count restarts at the
    step before a gate, at the gate, and where guidance stops.

    Attributes:
        interval: the number of steps from one computation of the deep layers to the next; 1 computes them at every
            step.
        branch: the skip connection at which the deep part begins; 0 is the outermost.
    """

    key: ClassVar[str] = "deepcache"
    title: ClassVar[str] = "DeepCache"

    interval: int = option(3, "Compute a UNet's deep layers at every n-th step only (DeepCache).", least=1)
    branch: int = option(0, "The skip connection at which the deep part begins; 0 is the outermost.", least=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", checked_count(self.interval, "deepcache_interval", least=1))
        object.__setattr__(self, "branch", checked_count(self.branch, "deepcache_branch", least=0))

    @property
    def kinds(self) -> frozenset[Kind]:
        return DEEP

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        computed = step in timeline.in_full or timeline.since_start(step) % self.interval == 0
        return Share(emit=DEEP) if computed else Share(reuse=DEEP)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share() if reuse - frozenset({"cross"}) else Share(emit=DEEP)
