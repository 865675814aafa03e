"""The operations of what a pipeline ran, from its graphs' own counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tgate_compile._hook import GatedDenoiser
from tgate_compile._schedule import Phase
from tgate_compile.passes.count_macs import count_macs


@dataclass(frozen=True)
class GraphCosts:
    """Multiply-accumulates, in linear and convolution layers (the paper's convention), of one denoiser's graphs.

    Attributes:
        per_row: by the name of a phase, for each row of the batch.
        guided: the batch of a call of a guided step.
        unguided: that of a step without guidance.
    """

    per_row: Mapping[str, float]
    guided: int
    unguided: int

    @classmethod
    def of(cls, hook: GatedDenoiser) -> GraphCosts:
        """Of the graphs made so far, all for images of one shape."""
        per_row: dict[str, float] = {}
        batches = set()
        for variant, captured in hook.store.variants:
            graph = variant.program.graph
            latents = next(node for node in graph.nodes if node.name == captured.latents)
            batch = latents.meta["val"].shape[0]
            per_row[variant.phase.name] = count_macs(graph).layers / batch
            batches.add(batch)
        return cls(per_row, max(batches), min(batches))

    def macs_of(self, calls: Iterable[Phase]) -> float:
        """Of these denoiser calls."""
        return sum(self.per_row[phase.name] * (self.guided if phase.guided else self.unguided) for phase in calls)
