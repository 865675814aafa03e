"""Steps, guidance and gate of a generation: what was asked for, else what the model's family needs."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_compile._cli.console import print_note
from tgate_compile._cli.loading import Loaded
from tgate_compile._schedule import Schedule

MSG_NEVER_GATED = (
    "Gate step {gate} is at or beyond the last of {steps} steps, so that nothing is gated. "
    "Give a smaller --gate-step, or --no-tgate."
)


@dataclass(frozen=True)
class Settings:
    """Of one generation.

    Attributes:
        steps: denoising steps.
        guidance: guidance scale.
        gate_step: as `optimize` takes it.
        gate: the first gated step.
    """

    steps: int
    guidance: float
    gate_step: int | float
    gate: int


def settings_for(
    loaded: Loaded, *, steps: int | None, guidance: float | None, gate_step: float | None, tgate: bool = True
) -> Settings:
    """What is None is the family's; its gate moves along with the number of steps."""
    family = loaded.family
    chosen_steps = family.steps if steps is None else steps
    if gate_step is None:
        gate_step = max(1, round(chosen_steps * family.gate_step / family.steps))
    gate = Schedule(gate_step).gate(chosen_steps)
    if tgate and gate >= chosen_steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=chosen_steps))
    return Settings(chosen_steps, family.guidance if guidance is None else guidance, gate_step, gate)
