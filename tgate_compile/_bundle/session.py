"""One of a bundle's graphs, open in its runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from tgate_compile._bundle.manifest import CacheOutput, Graph, TensorSpec
from tgate_compile._bundle.sizes import shape_at, solve


class Session(Protocol):
    """Runs one graph."""

    @property
    def provider(self) -> str:
        """What runs it, for a person: `CPUExecutionProvider`."""
        ...

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last.

        Raises:
            BackendError: the runtime fails.
        """
        ...


@runtime_checkable
class Refittable(Protocol):
    """A session whose graph can be given other weights."""

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these weights, by their names in the denoiser; those that are missing are the bundle's.

        Raises:
            BackendError: the graph cannot follow.
        """


def inputs_of(graph: Graph) -> list[TensorSpec]:
    """All inputs, caches last."""
    return [*graph.inputs, *graph.cache_inputs]


def outputs_of(graph: Graph) -> list[TensorSpec | CacheOutput]:
    """All outputs, caches last."""
    return [*graph.outputs, *graph.cache_outputs]


def sizes_for(graph: Graph, inputs: Sequence[torch.Tensor]) -> Mapping[str, int] | None:
    """The free sizes of `graph` for `inputs`, caches left out or not; None if they are of no shape that it takes."""
    specs = inputs_of(graph)[: len(inputs)]
    return solve([spec.shape for spec in specs], [tuple(tensor.shape) for tensor in inputs])


def output_shapes(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of all outputs for inputs of the right shapes."""
    sizes = sizes_for(graph, inputs)
    assert sizes is not None, "the store has checked the call"
    return [shape_at(spec.shape, sizes) for spec in outputs_of(graph)]
