"""A quantization that is asked for, with what was measured for it."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_compile._bundle.calibration import Calibration
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._quantization import Quantization


@dataclass(frozen=True)
class Quantizing:
    """What a format is told.

    Attributes:
        quantization: what is asked for.
        calibration: what all graphs were given in real generations; None: the scheme needs none.
    """

    quantization: Quantization
    calibration: Calibration | None

    def takes(self, planned: PlannedGraph) -> bool:
        """Whether `planned` is to be quantized."""
        return self.quantization.graphs == "all" or bool(planned.variant.phase.reuse)
