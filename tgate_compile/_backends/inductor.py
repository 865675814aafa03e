"""Compiled by TorchInductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from tgate_compile._backends._interface import Runner
from tgate_compile._errors import BackendError, ConfigurationError
from tgate_compile._graphs import Variant

logger = logging.getLogger(__name__)

MSG_FAILED = (
    "Inductor could not compile the {graph} graph ({problem}). On a CPU it needs a C++ compiler, on a GPU Triton. "
    'optimize(pipe, backend="eager") runs the same graph without compiling it.'
)


class InductorBackend:
    """Compiles the graph with Inductor directly.

    Not through `torch.compile`: there is nothing for Dynamo to trace in a graph, and without its guards a call
    costs less and cannot recompile. Weights stay inputs of the compiled code: no copy, and changes are seen.
    """

    name: ClassVar[str] = "inductor"

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = dict(options)

    @staticmethod
    def check_options(options: Mapping[str, object]) -> None:
        known = torch._inductor.list_options()
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigurationError(
                f'backend "inductor" does not know the options {unknown}; '
                "torch._inductor.list_options() lists those that it knows."
            )

    def compile(self, variant: Variant, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Runner:
        began = time.perf_counter()
        with torch.no_grad():
            try:
                compiled = torch._inductor.compile(
                    variant.program.graph_module, [*weights, *_contiguous(inputs)], options=self._options
                )
            except Exception as error:  # a missing C++ compiler, an unknown option's value, Inductor's own bugs
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                raise BackendError(MSG_FAILED.format(graph=variant.phase.name, problem=problem)) from error
        logger.info("compiled the %s graph in %.1f s", variant.phase.name, time.perf_counter() - began)

        def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            outputs: Sequence[torch.Tensor] = compiled(*weights, *_contiguous(inputs))
            return outputs

        return run


def _contiguous(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    # Compiled code is made for the strides that it was compiled with.
    return [tensor.contiguous() for tensor in inputs]
