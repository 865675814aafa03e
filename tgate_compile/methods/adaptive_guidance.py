"""Adaptive Guidance: end guidance early, without caching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import NONE, Kind, Method, Share, Timeline, checked_gate_step, option, steps_of


@dataclass(frozen=True)
class AdaptiveGuidance(Method):
    """Adaptive Guidance (arXiv 2312.12487, section 5): guidance ends at a step, or when the predictions are similar.

    With a fixed step it is the proper baseline for T-GATE, whose gate ends guidance as well.

    Attributes:
        step: the number of guided steps, or the fraction of the steps that is guided.
        similarity: the cosine similarity of the conditional and the unconditional prediction, between 0 and 1, at
            which guidance ends. Computing it synchronizes with the device at every guided step.
    """

    key: ClassVar[str] = "guidance"
    title: ClassVar[str] = "Adaptive Guidance"

    step: int | float | None = option(None, "The number or the fraction of steps after which guidance ends.")
    similarity: float | None = option(None, "The cosine similarity of the two predictions at which guidance ends.")

    def __post_init__(self) -> None:
        if self.step is not None:
            object.__setattr__(self, "step", checked_gate_step(self.step, "guidance_step"))
        similarity = self.similarity
        if similarity is not None and not (isinstance(similarity, float) and 0.0 < similarity < 1.0):
            raise ConfigurationError(
                f"guidance_similarity must be a number between 0 and 1 (the paper uses 0.991), but got {similarity!r}."
            )
        if (self.step is None) == (similarity is None):
            raise ConfigurationError("AdaptiveGuidance needs either a step or a similarity.")

    @property
    def kinds(self) -> frozenset[Kind]:
        return NONE

    def guided_steps(self, num_steps: int) -> int:
        return steps_of(self.step, num_steps)

    def share(self, step: int, guided: bool, timeline: Timeline) -> Share:
        return Share()

    def hands_on(self, guided: bool, reuse: frozenset[Kind]) -> Share:
        return Share()
