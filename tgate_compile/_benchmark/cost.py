"""What a generation cost: multiply-accumulates and parameters, read off the graphs that ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgate_compile._describe import describe
from tgate_compile._optimized import required_state_of
from tgate_compile._tuning.graph_costs import GraphCosts


@dataclass(frozen=True)
class Cost:
    """Of the denoisers, for one generation.

    Attributes:
        macs: multiply-accumulates in linear and convolution layers: the paper's convention.
        parameters_at_end: of the largest graph that the last step's phase, and those after the gate, needed.
        cache_bytes: the most that is kept from one step to the next.
        strip: one character a step.
    """

    macs: float
    parameters_at_end: int
    cache_bytes: int
    strip: str


def cost_of_last(pipe: Any) -> Cost:
    """The cost of the last generation of an optimized pipeline."""
    description = describe(pipe)
    macs, parameters = 0.0, 0
    sizes = {(variant.denoiser, variant.name): variant.parameters for variant in description.variants}
    for name, hook in required_state_of(pipe).hooks.items():
        phases = [] if hook.last is None else [phase for _, phase in hook.last.steps]
        if not phases:
            continue
        macs += GraphCosts.of(hook).macs_of(phases)
        gated = [phase for phase in phases if "cross" in phase.reuse] or phases
        parameters += max(sizes[name, phase.name] for phase in gated)
    return Cost(macs, parameters, description.cache_bytes, description.strip)


def plain_macs(optimized: Any, rows: Mapping[str, int]) -> float:
    """The cost of the plain pipeline: the full graphs of an optimized one, for so many rows of batches by denoiser."""
    hooks = required_state_of(optimized).hooks
    return sum(count * GraphCosts.of(hooks[name]).per_row["full"] for name, count in rows.items())
