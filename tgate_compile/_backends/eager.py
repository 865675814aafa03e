"""The rewritten graph as it is, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from tgate_compile._backends._interface import Runner
from tgate_compile._errors import ConfigurationError
from tgate_compile._graphs import Variant


class EagerBackend:
    """Runs the graph's ATen operators one by one: no compile time, the plain pipeline's numbers to the bit."""

    name: ClassVar[str] = "eager"
    packs_weights: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, object]) -> None:
        del options  # there are none

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        if options:
            raise ConfigurationError(f'backend "eager" has no options, but got {dict(options)!r}.')

    def lowered_to(self, device: torch.device) -> torch.dtype | None:
        return None

    def compile(self, variant: Variant, inputs: Sequence[torch.Tensor]) -> Runner:
        graph_module = variant.program.graph_module

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            outputs: Sequence[torch.Tensor] = graph_module(*weights, *inputs)
            return outputs

        return run
