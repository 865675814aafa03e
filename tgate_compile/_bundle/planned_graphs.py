"""Which graphs a bundle has: every one that the schedule needs, each with a name and with names for what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgate_compile._bundle.argument_names import argument_names
from tgate_compile._bundle.weights_digest import weights_of
from tgate_compile._call import Call
from tgate_compile._generation import Plan
from tgate_compile._graphs import Captured, Emission, Site, Variant
from tgate_compile._hook import DenoiserHook
from tgate_compile._schedule import Phase
from tgate_compile._variants import VariantStore


@dataclass(frozen=True)
class PlannedGraph:
    """A variant to be written.

    Attributes:
        name: of the graph, and of its file.
        variant: the graph.
        captured: what it is made of.
        arguments: what each argument of the denoiser's call was, by its name.
        own_names: the bundle's names of the variant's inputs.
        weights: the tensors of the variant's weights, in its order; the denoiser's own, not copies.
    """

    name: str
    variant: Variant
    captured: Captured
    arguments: Mapping[str, object]
    own_names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of all inputs, caches last."""
        return (*self.own_names, *(cache_name(site) for site in self.variant.reused))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Of all outputs, caches last."""
        count = self.captured.out_spec.num_leaves
        own = ["out_sample", *(f"out_{i}" for i in range(1, count))]
        whole = {emission.site for emission in self.variant.emitted if not emission.merged}
        return (*own, *(_emission_name(emission, whole) for emission in self.variant.emitted))

    @property
    def latents(self) -> str:
        """The input that carries the latents."""
        return self.own_names[self.variant.inputs.index(self.captured.latents)]

    @property
    def example_inputs(self) -> list[torch.Tensor]:
        """The inputs of the call that it was planned for, caches left out."""
        values = [self.arguments[name] for name in self.own_names]
        return [value for value in values if isinstance(value, torch.Tensor)]


def planned_graphs(hook: DenoiserHook, plan: Plan) -> dict[Phase, PlannedGraph]:
    """The graphs of `plan`, by the phase that each serves."""
    assert isinstance(hook.store, VariantStore)
    live = weights_of(hook.denoiser)
    graphs = {}
    for phase, call in plan.graphs:
        if phase not in graphs:
            variant, captured = hook.store.variant(phase, call, hook.own_forward)
            graphs[phase] = _planned(variant, captured, call, argument_names(call, hook.own_forward), live)
    return graphs


def graph_name(phase: Phase) -> str:
    """`full`, `pruned`, `pruned-self-reused`; what may run with guidance and without says so: `full-unguided`."""
    name = phase.name.replace(", ", "-")
    return name if phase.guided or "cross" in phase.reuse else f"{name}-unguided"


def cache_name(site: Site) -> str:
    """Of an input or output that carries the value of `site`."""
    return f"cache.{site.name}"


def _planned(
    variant: Variant, captured: Captured, call: Call, names: tuple[str, ...], live: Mapping[str, torch.Tensor]
) -> PlannedGraph:
    constants = variant.program.constants
    own = dict(zip(captured.input_names, names, strict=True))
    return PlannedGraph(
        graph_name(variant.phase),
        variant,
        captured,
        dict(zip(names, call.leaves, strict=True)),
        tuple(own[name] for name in variant.inputs),
        tuple(live[name] if name in live else constants[name] for name in variant.weights),
    )


def _emission_name(emission: Emission, whole: set[Site]) -> str:
    """A graph may hand on a value both whole and merged."""
    return cache_name(emission.site) + (".merged" if emission.merged and emission.site in whole else "")
