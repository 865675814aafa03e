"""Adaptive Guidance: guidance ends early, and nothing is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import NONE, Kind, Method, Share, Timeline, checked_gate_step, option, steps_of


@dataclass(frozen=True)
class AdaptiveGuidance(Method):
    """Adaptive Guidance (arXiv 2312.12487, section 5): guidance ends at a step, or by the predictions' similarity.

    With a fixed step it is the honest baseline for T-GATE, whose gate ends guidance as well.

    Attributes:
        step: a number of steps, or a fraction of them.
        similarity: the cosine similarity, above 0 and below 1, of the conditional and the unconditional prediction
            after which guidance stops. It costs a synchronization with the device at every guided step.
    """

    key: ClassVar[str] = "guidance"
    title: ClassVar[str] = "Adaptive Guidance"

    step: int | float | None = option(None, "Guidance ends after so many steps, or such a fraction of them.")
    similarity: float | None = option(None, "Guidance ends when the two predictions are this similar.")

    def __post_init__(self) -> None:
        if self.step is not None:
            object.__setattr__(self, "step", checked_gate_step(self.step, "guidance_step"))
        similarity = self.similarity
        if similarity is not None and not (isinstance(similarity, float) and 0.0 < similarity < 1.0):
            raise ConfigurationError(
                f"guidance_similarity must be a number between 0 and 1 (the paper's: 0.991), but got {similarity!r}."
            )
        if (self.step is None) == (similarity is None):
            raise ConfigurationError("AdaptiveGuidance needs a step or a similarity, one of the two.")

    @property
    def kinds(self) -> frozenset[Kind]:
        return NONE

    def guided_steps(self, num_steps: int) -> int:
        return steps_of(self.step, num_steps)

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        return Share()

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share()
