"""From step to phase: what a denoising step reuses, what it hands on, and whether guidance runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tgate_compile._errors import ConfigurationError

Kind = Literal["cross"]

MSG_GATE_STEP = (
    "gate_step must be a whole number of steps, at least 1 (10: ten steps in full), or a fraction of the "
    "steps strictly between 0 and 1 (0.4: the first 40 %), but got {given!r}."
)


@dataclass(frozen=True)
class Phase:
    """What one step does.

    Attributes:
        guided: the denoiser sees both guidance halves, [uncond; cond], batch 2B.
        emit: kinds of site whose value is handed on to later steps. Under guidance the value is the mean
            of the two halves (arXiv 2404.02747, section 3.2), so that what is handed on always has batch B.
        reuse: kinds of site whose value comes from an earlier step, and is not computed.
    """

    guided: bool
    emit: frozenset[Kind] = frozenset()
    reuse: frozenset[Kind] = frozenset()

    @property
    def name(self) -> str:
        """`full` or `pruned`, as the graphs are called in descriptions and bundles."""
        return "pruned" if self.reuse else "full"


@dataclass(frozen=True)
class TGate:
    """T-GATE v1: `gate_step` steps in full, then every cross-attention output is the cached one.

    The cache is taken at step `gate_step - 1`. From step `gate_step` on, guidance does not run.
    Source: arXiv 2404.02747 v1, section 3.2 and algorithm 1.

    Attributes:
        gate_step: a number of steps (>= 1), or a fraction of the steps (0 < x < 1). A gate at or beyond the
            last step means: never gated.
    """

    gate_step: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate_step", checked_gate_step(self.gate_step))

    def gate(self, num_steps: int) -> int:
        """The first step that reuses the cache, for a generation of `num_steps` steps."""
        if isinstance(self.gate_step, float):
            return max(1, round(self.gate_step * num_steps))
        return self.gate_step

    def phase(self, step: int, num_steps: int, *, guided: bool) -> Phase:
        """What step `step` (from 0) of `num_steps` does; `guided` says whether guidance is on."""
        if step < self.gate(num_steps):
            # Every step before the gate emits, though only the last one's values are used: one graph
            # then serves them all, and a mean per site costs next to nothing.
            return Phase(guided=guided, emit=frozenset({"cross"}))
        return Phase(guided=False, reuse=frozenset({"cross"}))

    def strip(self, num_steps: int) -> str:
        """One character a step: `F` full, `p` pruned."""
        return "".join(self.phase(i, num_steps, guided=True).name[0] for i in range(num_steps)).replace("f", "F")


def checked_gate_step(given: object) -> int | float:
    """`given` as a plain int (steps) or float (fraction).

    Raises:
        ConfigurationError: it is neither a whole number >= 1 nor a fraction strictly between 0 and 1.
    """
    if not isinstance(given, bool):
        if isinstance(given, float):
            if 0.0 < given < 1.0:
                return float(given)
        elif hasattr(given, "__index__"):
            steps = given.__index__()
            if steps >= 1:
                return int(steps)
    raise ConfigurationError(MSG_GATE_STEP.format(given=given))
