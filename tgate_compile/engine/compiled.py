"""What a generation runs: a compiled variant, and the interface of the stores that hold them."""

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

#: The cached values, by kind and name of their sites.
Caches = Mapping[tuple[Kind, str], torch.Tensor]


class Runnable(Protocol):
    """The graph of one phase, ready to run on inputs of one shape."""

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values it hands on, in order."""
        ...

    def run(self, call: Call, caches: Caches) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The denoiser's flat outputs for `call`, and the values of `emitted`."""
        ...

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """What the denoiser returns, from its flat outputs."""
        ...


class Store(Protocol):
    """What a generation gets its graphs from."""

    denoiser: torch.nn.Module

    @property
    def folder(self) -> str | None:
        """The bundle that the graphs come from; None if they are made here."""
        ...

    @property
    def site_names(self) -> tuple[str, ...]:
        """What can be cached, as far as is known."""
        ...

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants made here, and what each is made of."""
        ...

    def refresh(self, *, begins: bool = True) -> None:
        """Look at the denoiser again, at the start of a generation, or in the middle of one that changes it."""
        ...

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """What the graph of `phase` for inputs like those of `call` hands on; nothing is compiled for it."""
        ...

    def get(self, phase: Phase, call: Call, caches: Caches, forward: Callable[..., Any]) -> Runnable:
        """The graph of `phase` for inputs like those of `call`; `forward` is the denoiser's original one."""
        ...


@dataclass(frozen=True)
class CompiledVariant:
    """A variant, ready to run on inputs of one shape."""

    variant: Variant
    captured: Captured
    runner: Runner
    weights: Sequence[torch.Tensor]

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values it hands on, in order."""
        return self.variant.emitted

    def run(self, call: Call, caches: Caches) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The denoiser's flat outputs for `call`, and the values that the graph emits, in its order."""
        outputs = list(self.runner(self.weights, inputs_for(self.variant, self.captured, call, caches)))
        count = self.captured.out_spec.num_leaves
        return outputs[:count], outputs[count:]

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """What the denoiser returns, from its flat outputs."""
        return pytree.tree_unflatten(outputs, self.captured.out_spec)


def inputs_for(variant: Variant, captured: Captured, call: Call, caches: Caches) -> list[torch.Tensor]:
    by_name = dict(zip(captured.input_names, call.leaves, strict=True))
    reused = [caches[site.kind, site.name] for site in variant.reused]
    return [*(by_name[name] for name in variant.inputs), *reused]
