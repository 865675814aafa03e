"""Compiled variants, which a generation runs, and the interface of the stores that provide them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from tgate_compile.engine.backends import Runner
from tgate_compile.engine.call import Call
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Captured, Emission, Variant

#: Cached values by the kind and name of their sites.
CachedValues = Mapping[tuple[Kind, str], torch.Tensor]


class Runnable(Protocol):
    """The graph of one phase, ready to run on inputs of one shape."""

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values the graph returns for later steps, in order."""
        ...

    def run(self, call: Call, caches: CachedValues) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`."""
        ...

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Return the denoiser's return value, assembled from its flat outputs."""
        ...


class Store(Protocol):
    """Provides a generation with graphs."""

    denoiser: torch.nn.Module

    @property
    def folder(self) -> str | None:
        """The bundle that the graphs are loaded from; None if they are captured in this process."""
        ...

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of the sites that can be cached, if already known."""
        ...

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants captured in this process, each with the capture that it was derived from."""
        ...

    def refresh(self, *, begins: bool = True) -> None:
        """Check the denoiser for changes, at the start of a generation or, if not `begins`, in the middle of one."""
        ...

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return what the graph of `phase` emits for inputs like those of `call`, without compiling it."""
        ...

    def get(self, phase: Phase, call: Call, caches: CachedValues, forward: Callable[..., Any]) -> Runnable:
        """Return the graph of `phase` for inputs like those of `call`; `forward` is the denoiser's original one."""
        ...


@dataclass(frozen=True)
class CompiledVariant:
    """A variant that is ready to run on inputs of one shape."""

    variant: Variant
    captured: Captured
    runner: Runner
    weights: Sequence[torch.Tensor]

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values the graph returns for later steps, in order."""
        return self.variant.emitted

    def run(self, call: Call, caches: CachedValues) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`."""
        outputs = list(self.runner(self.weights, inputs_for(self.variant, self.captured, call, caches)))
        count = self.captured.out_spec.num_leaves
        return outputs[:count], outputs[count:]

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Return the denoiser's return value, assembled from its flat outputs."""
        return pytree.tree_unflatten(outputs, self.captured.out_spec)


def inputs_for(variant: Variant, captured: Captured, call: Call, caches: CachedValues) -> list[torch.Tensor]:
    """Return the inputs of `variant` in its order: the tensors that it takes from `call`, then the reused values."""
    by_name = dict(zip(captured.input_names, call.leaves, strict=True))
    reused = [caches[site.kind, site.name] for site in variant.reused]
    return [*(by_name[name] for name in variant.inputs), *reused]
