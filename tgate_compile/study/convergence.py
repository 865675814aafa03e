"""How much the cross-attentions still change from step to step: the observation that T-GATE rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Convergence:
    """The change of the cross-attentions' outputs from each step to the next, ||o_i - o_(i-1)|| / ||o_i||.

    Source: arXiv 2404.02747, figure 2, where it is not relative.

    Attributes:
        mean: over sites and images; the first is that of step 1 to step 0. Empty where the denoiser has no
            cross-attention.
        spread: the standard deviation.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, changes: Mapping[int, list[float]]) -> Convergence:
        """From the changes at each step."""
        steps = [torch.tensor(changes[step], dtype=torch.float64) for step in sorted(changes)]
        return cls(
            mean=tuple(step.mean().item() for step in steps),
            spread=tuple(step.std(correction=0).item() for step in steps),
        )
