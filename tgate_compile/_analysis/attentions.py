"""From what attentions put out to curves: how they converge, how large they are, how far the halves are apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tgate_compile._analysis.curves import Curve, Tallies
from tgate_compile._schedule import Kind
from tgate_compile._tuning.recorder import Sample


@dataclass(frozen=True)
class SiteCurves:
    """One attention.

    Attributes:
        difference: ||o_i - o_(i-1)||, the L2 distance between consecutive steps, both guidance halves together.
        relative: the same over ||o_i||.
    """

    difference: Curve
    relative: Curve


@dataclass(frozen=True)
class Attentions:
    """All attentions of one kind.

    Source: arXiv 2404.02747 v1, figure 2: there each point is the mean over 1,000 captions and over all
    cross-attentions of the L2 difference between two consecutive steps, and the shade its spread.

    Attributes:
        difference: the mean over sites of ||o_i - o_(i-1)||, both guidance halves together; spread over images.
        relative: of ||o_i - o_(i-1)|| / ||o_i||.
        relative_by_half: the same by guidance half, "uncond" and "cond"; "all" if there is no guidance.
        norms: ||o_i|| by guidance half.
        apart: ||cond - uncond|| / ||cond||; empty without guidance.
        sites: each attention by itself.
    """

    difference: Curve
    relative: Curve
    relative_by_half: Mapping[str, Curve]
    norms: Mapping[str, Curve]
    apart: Curve
    sites: Mapping[str, SiteCurves]


class Collected:
    """What has been recorded of some images."""

    def __init__(self) -> None:
        self._tallies = Tallies()
        self._kinds: dict[str, Kind] = {}

    @property
    def kinds(self) -> dict[Kind, Attentions]:
        """The curves, cross-attentions first; kinds that no attention has are left out."""
        found = set(self._kinds.values())
        kinds: tuple[Kind, ...] = ("cross", "self")
        return {kind: self._attentions(kind) for kind in kinds if kind in found}

    def add(self, samples: Iterable[Sample]) -> None:
        """Those of one image."""
        # By kind and quantity, then by step: the values of all sites.
        values: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        # By site and step: the squares of norm and change, over both halves.
        norms: dict[tuple[str, int], float] = defaultdict(float)
        changes: dict[tuple[str, int], float] = defaultdict(float)
        for sample in samples:
            kind, half, step = sample.kind, sample.half or "all", sample.step
            self._kinds[sample.site] = kind
            norm = sample.norm.item()
            values[kind, "norm", half][step].append(norm)
            norms[sample.site, step] += norm**2
            if sample.change is not None:
                change = sample.change.item()
                values[kind, "relative", half][step].append(_ratio(change, norm))
                changes[sample.site, step] += change**2
            if sample.apart is not None:
                values[kind, "apart"][step].append(_ratio(sample.apart.item(), norm))
        for (site, step), square in changes.items():
            difference, relative = math.sqrt(square), _ratio(math.sqrt(square), math.sqrt(norms[site, step]))
            for quantity, value in (("difference", difference), ("relative", relative)):
                values[self._kinds[site], quantity][step].append(value)
                self._tallies.add((quantity, site), step, value)
        for key, by_step in values.items():
            self._tallies.add_means(key, by_step)

    def _attentions(self, kind: Kind) -> Attentions:
        curve = self._tallies.curve
        halves = [half for half in ("uncond", "cond", "all") if (kind, "norm", half) in self._tallies]
        return Attentions(
            difference=curve((kind, "difference")),
            relative=curve((kind, "relative")),
            relative_by_half={half: curve((kind, "relative", half)) for half in halves},
            norms={half: curve((kind, "norm", half)) for half in halves},
            apart=curve((kind, "apart")),
            sites={
                site: SiteCurves(curve(("difference", site)), curve(("relative", site)))
                for site, its_kind in self._kinds.items()
                if its_kind == kind
            },
        )


def _ratio(value: float, norm: float) -> float:
    return value / max(norm, 1e-12)
