"""T-GATE: compute cross-attention and guidance up to a gate step only, and self-attention at intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    CROSS,
    NONE,
    SELF,
    Kind,
    Method,
    Share,
    Timeline,
    checked_count,
    checked_gate_step,
    checked_number,
    option,
    steps_of,
)


@dataclass(frozen=True)
class TGate(Method):
    """T-GATE (arXiv 2404.02747).

    Version 1 (section 3.2 and algorithm 1): `gate_step` steps run in full. The cross-attention outputs are cached at
    the last of them, under guidance as the mean of both halves. From step `gate_step` on they are reused, and guidance
    is off.

    Version 2 (section 4, and the authors' package, 1.0.0): before the gate, self-attention is computed up to step
    `warm_up`, then at every `sp_interval`-th step and at the last one; after the gate it is computed at every
    `fi_interval`-th step. Steps are counted from 0.

    Attributes:
        gate_step: the number of steps (>= 1), or the fraction of the steps (0 < x < 1), that run in full. If it is not
            less than the number of steps, nothing is gated.
        sp_interval: the interval of self-attention before the gate, in steps; 1 computes it at every step.
        fi_interval: the interval of self-attention after the gate, in steps; 1 computes it at every step.
        warm_up: the step, from 0, up to which self-attention is computed at every step.
        anchor_weight: the weight w of the cond half in the cached value, `(1 - w) * uncond + w * cond`. 0.5 is the
            paper's mean, 1 is the cond half alone, and larger values extrapolate beyond it.
        text_interval: the interval of cross-attention, or of the text in joint attention, after the gate, in steps;
            None means that it is never computed again.
    """

    key: ClassVar[str] = "tgate"
    title: ClassVar[str] = "T-GATE"

    gate_step: int | float = option(10, "The number or the fraction of steps that run in full.")
    sp_interval: int = option(1, "Before the gate, compute self-attention at every n-th step only.", least=1)
    fi_interval: int = option(1, "After the gate, compute self-attention at every n-th step only.", least=1)
    warm_up: int = option(2, "The step, from 0, after which sp_interval begins.", least=0)
    anchor_weight: float = option(0.5, "The weight of the cond half in the cached mean.")
    text_interval: int | None = option(
        None, "Compute cross-attention, or the text in joint attention, at every n-th step after the gate.", least=1
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate_step", checked_gate_step(self.gate_step))
        for name in ("sp_interval", "fi_interval"):
            object.__setattr__(self, name, checked_count(getattr(self, name), name, least=1))
        object.__setattr__(self, "warm_up", checked_count(self.warm_up, "warm_up", least=0))
        object.__setattr__(self, "anchor_weight", checked_number(self.anchor_weight, "anchor_weight"))
        if self.text_interval is not None:
            object.__setattr__(self, "text_interval", checked_count(self.text_interval, "text_interval", least=1))

    @property
    def kinds(self) -> frozenset[Kind]:
        return CROSS | (SELF if max(self.sp_interval, self.fi_interval) > 1 else NONE)

    def gate(self, num_steps: int) -> int:
        return steps_of(self.gate_step, num_steps)

    def guided_steps(self, num_steps: int) -> int:
        return self.gate(num_steps)

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        gate = self.gate(timeline.num_steps)
        if step >= gate:
            reuse, emit = self._at(self.fi_interval > 1, step % self.fi_interval == 0)
            if self.text_interval is not None and step % self.text_interval == 0:
                return Share(emit=emit | CROSS, reuse=reuse)
            return Share(emit=emit, reuse=reuse | CROSS)
        last = step == gate - 1
        waits = self.sp_interval > 1 and step >= self.warm_up and not last
        reuse, emit = self._at(waits, step == self.warm_up or step % self.sp_interval == 0)
        at_gate = self._at_gate if last else NONE
        return Share(emit, at_gate, reuse) if guided else Share(emit | at_gate, NONE, reuse)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        if reuse - CROSS:
            again = self.text_interval is not None and not guided and reuse.isdisjoint(CROSS)
            return Share(emit=CROSS if again else NONE)
        if reuse:
            return Share(emit=SELF if self.fi_interval > 1 else NONE)
        planning = SELF if self.sp_interval > 1 else NONE
        return Share(planning, self._at_gate) if guided else Share(planning | self._at_gate)

    @property
    def _at_gate(self) -> frozenset[Kind]:
        return CROSS | (SELF if self.fi_interval > 1 else NONE)

    @staticmethod
    def _at(applies: bool, computed: bool) -> tuple[frozenset[Kind], frozenset[Kind]]:
        """Return the kinds reused and emitted at a step: self-attention in one of the two, if the interval applies."""
        if not applies:
            return NONE, NONE
        return (NONE, SELF) if computed else (SELF, NONE)


def refuse_options_without_gate(
    sp_interval: int, fi_interval: int, anchor_weight: float, text_interval: int | None
) -> None:
    """Raise ConfigurationError if options of T-GATE are set without a gate."""
    if max(sp_interval, fi_interval) > 1:
        raise ConfigurationError(
            "sp_interval and fi_interval are options of T-GATE and need a gate_step, but got gate_step=None with "
            f"sp_interval={sp_interval} and fi_interval={fi_interval}."
        )
    if text_interval is not None:
        raise ConfigurationError(
            "text_interval is an option of T-GATE and needs a gate_step, but got gate_step=None. Without one, use "
            "FrozenText(step, interval)."
        )
    if anchor_weight != 0.5:
        raise ConfigurationError("anchor_weight is an option of T-GATE and needs a gate_step, but got gate_step=None.")
