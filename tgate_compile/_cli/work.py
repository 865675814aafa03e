"""Multiply-accumulates of a whole image, from the graphs' own counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tgate_compile._describe import Description
from tgate_compile._schedule import Schedule
from tgate_compile._steps import StepCounter


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates in linear and convolution layers, over all steps of one image.

    Attributes:
        plain: without T-GATE.
        guidance_dropped: as many guided steps, then steps without guidance, and nothing cached.
        gated: with T-GATE.
    """

    plain: int
    guidance_dropped: int
    gated: int

    def as_dict(self) -> dict[str, int]:
        """Plain data; the names say what is counted."""
        return {f"macs_{name}": value for name, value in asdict(self).items()}


def planned_calls(scheduler: Any, schedule: Schedule, num_steps: int) -> str:
    """One character per denoiser call of a generation, `F` full or `p` pruned. Sets the scheduler's timesteps."""
    scheduler.set_timesteps(num_steps)
    counter = StepCounter.of(scheduler, None)
    steps = [counter.step(call) for call in range(len(scheduler.timesteps))]
    return "".join("p" if step >= schedule.gate(counter.num_steps) else "F" for step in steps)


def work_of(description: Description, calls: str) -> Work:
    """The work of a generation with these calls, for an optimized pipeline that has run both graphs.

    A call of the full graph without guidance is the same work at the batch of the pruned graph.
    """
    by_name = {variant.name: variant for variant in description.variants}
    full = by_name["full"]
    pruned = by_name.get("pruned", full)
    calls_full, calls_pruned = calls.count("F"), calls.count("p")
    return Work(
        plain=full.macs * len(calls),
        guidance_dropped=full.macs * calls_full + full.macs * pruned.batch // full.batch * calls_pruned,
        gated=full.macs * calls_full + pruned.macs * calls_pruned,
    )
