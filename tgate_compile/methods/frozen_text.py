"""Frozen tokens: the influence of the text, or of reference images, stays constant from a step on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import (
    CROSS,
    NONE,
    REFERENCE,
    Kind,
    Method,
    Share,
    Timeline,
    checked_count,
    checked_gate_step,
    option,
    steps_of,
)


@dataclass(frozen=True)
class FrozenText(Method):
    """Frozen text. Guidance is not affected: each guidance half keeps its own text.

    From step `step` on, joint attention uses the text's keys and values of step `step - 1`, and the text's tokens are
    no longer computed. In models with cross-attention, the outputs of the cross-attentions are reused instead.

    `TGate` does the same and also ends guidance at that step; `AdaptiveGuidance` only ends guidance.

    Attributes:
        step: the number of steps (>= 1), or the fraction of the steps (0 < x < 1), in which the text is computed.
        interval: after that, the text is computed again at every step whose number, from 0, is a multiple of this;
            None means never.
        text: the form in which joint attention caches the text: its keys and values ("keys"), or the hidden states
            from which they are computed ("hidden"). With "hidden", the modulation by the timestep and the projections
            to keys and values are still computed in every step.
    """

    key: ClassVar[str] = "frozentext"
    title: ClassVar[str] = "Frozen text"

    step: int | float = option(10, "The number or the fraction of steps after which the text is frozen.", is_gate=True)
    interval: int | None = option(None, "Compute the frozen text again at every n-th step.", least=1)
    text: str = option("keys", 'The cached form of text in joint attention: "keys" (and values) or "hidden" states.')

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", checked_gate_step(self.step, "FrozenText's step"))
        if self.interval is not None:
            object.__setattr__(self, "interval", checked_count(self.interval, "FrozenText's interval", least=1))
        if self.text not in ("keys", "hidden"):
            raise ConfigurationError(f'FrozenText\'s text must be "keys" or "hidden", but got {self.text!r}.')

    @property
    def hidden_text(self) -> bool:
        return self.text == "hidden"

    @property
    def kinds(self) -> frozenset[Kind]:
        return CROSS

    def gate(self, num_steps: int) -> int:
        return steps_of(self.step, num_steps)

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        if self._is_frozen(step, timeline):
            return Share(reuse=CROSS)
        return Share(emit=CROSS if self._is_frozen(step + 1, timeline) else NONE)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share(emit=CROSS - reuse)

    def _is_frozen(self, step: int, timeline: Timeline) -> bool:
        if step < self.gate(timeline.num_steps) or step in timeline.in_full or step == timeline.guided_steps:
            return False  # where guidance ends, both halves have been cached, and the next step needs one
        return self.interval is None or step % self.interval != 0


@dataclass(frozen=True)
class FrozenReferences(Method):
    """Frozen reference images, for edit models with joint attention (FLUX Kontext, Qwen-Image-Edit, FLUX.2).

    From step `step` on, the keys and values of the reference images' tokens are those of step `step - 1`, and these
    tokens, often half of all or more, are no longer computed. Guidance continues, and each guidance half keeps its own
    keys and values; where guidance ends, they are computed once more.

    Attributes:
        step: the number of steps (>= 1), or the fraction of the steps (0 < x < 1), at which they are always computed.
        interval: after that, they are computed again at every step whose number, from 0, is a multiple of this; None
            means never.
    """

    key: ClassVar[str] = "references"
    title: ClassVar[str] = "Frozen references"

    step: int | float = option(
        1, "The number or the fraction of steps after which reference images are frozen.", is_gate=True
    )
    interval: int | None = option(None, "Compute frozen reference images again at every n-th step.", least=1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", checked_gate_step(self.step, "FrozenReferences' step"))
        if self.interval is not None:
            object.__setattr__(self, "interval", checked_count(self.interval, "FrozenReferences' interval", least=1))

    @property
    def kinds(self) -> frozenset[Kind]:
        return REFERENCE

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        if self._is_frozen(step, timeline):
            return Share(reuse=REFERENCE)
        return Share(emit=REFERENCE if self._is_frozen(step + 1, timeline) else NONE)

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share(emit=REFERENCE - reuse)

    def _is_frozen(self, step: int, timeline: Timeline) -> bool:
        if step < steps_of(self.step, timeline.num_steps) or step == timeline.guided_steps:
            return False  # where guidance ends, both halves have been cached, and the next step needs one
        return self.interval is None or step % self.interval != 0
