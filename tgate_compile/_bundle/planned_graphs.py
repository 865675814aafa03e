"""Which graphs a bundle has: every one that the schedule needs, each with a name and with names for what it takes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tgate_compile._bundle.argument_names import argument_names
from tgate_compile._call import Call
from tgate_compile._free_sizes import FreeSize, free_shapes
from tgate_compile._generation import Plan
from tgate_compile._graphs import Captured, Emission, Site, Variant
from tgate_compile._hook import GatedDenoiser
from tgate_compile._live_tensors import live_tensors
from tgate_compile._schedule import Kind, Phase
from tgate_compile._variants import VariantStore

#: What denoisers call their timestep.
TIMESTEPS = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class PlannedGraph:
    """A variant to be written.

    Attributes:
        name: of the graph, and of its file.
        variant: the graph, with free sizes.
        captured: what it is made of.
        sized: the graph for the shapes of the call alone.
        arguments: what each argument of the denoiser's call was, by its name.
        own_names: the bundle's names of the variant's inputs.
        weights: the tensors of the variant's weights, in its order; the denoiser's own, not copies.
        units: see `FreeShapes`; empty if no size is free.
    """

    name: str
    variant: Variant
    captured: Captured
    sized: Variant
    arguments: Mapping[str, object]
    own_names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    units: Mapping[str, int]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of all inputs, caches last."""
        return (*self.own_names, *(cache_name(site) for site in self.variant.reused))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Of all outputs, caches last."""
        count = self.captured.out_spec.num_leaves
        own = ["out_sample", *(f"out_{i}" for i in range(1, count))]
        whole = {(emission.site.kind, emission.site.name) for emission in self.variant.emitted if not emission.merged}
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


def planned_graphs(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize]) -> dict[Phase, PlannedGraph]:
    """The graphs of `plan`, by the phase that each serves, with the sizes `free`.

    Raises:
        CaptureError: torch.export finds that the denoiser's code depends on one of these sizes.
    """
    assert isinstance(hook.store, VariantStore)
    live = live_tensors(hook.denoiser)
    calls: dict[Hashable, Call] = {call.key: call for _, call in plan.graphs}
    phases = dict.fromkeys((phase, call.key) for phase, call in plan.graphs)
    graphs = {}
    for key, call in calls.items():
        wanted = [phase for phase, its_key in phases if its_key == key and phase not in graphs]
        sized = [hook.store.variant(phase, call, hook.own_forward)[0] for phase in wanted]
        names = argument_names(call, hook.own_forward)
        call = _with_float_timestep(call, names)
        guided = {phase.guided for phase in wanted} == {True}
        shapes = free_shapes(hook.denoiser, hook.own_forward, call, hook.config.family, guided=guided, free=free)
        variants, captured = hook.store.free_variants(wanted, shapes.call, hook.own_forward, shapes.shapes)
        for phase, variant, static in zip(wanted, variants, sized, strict=True):
            graphs[phase] = _planned(variant, captured, static, call, names, live, shapes.units)
    return {phase: graphs[phase] for phase, _ in phases}


def _with_float_timestep(call: Call, names: Sequence[str]) -> Call:
    """`call` with a timestep in float32, so that one graph serves schedulers with whole steps and with parts of them.

    Denoisers begin by making it float themselves.
    """
    leaves = [
        leaf.float() if name in TIMESTEPS and torch.is_tensor(leaf) and not leaf.is_floating_point() else leaf
        for name, leaf in zip(names, call.leaves, strict=True)
    ]
    return Call(tuple(leaves), call.spec)


def graph_name(phase: Phase) -> str:
    """`full`, `pruned`, `pruned-self-reused`; what may run with guidance and without says so: `full-unguided`."""
    name = phase.name.replace(", ", "-")
    return name if phase.guided or "cross" in phase.reuse else f"{name}-unguided"


def cache_name(site: Site) -> str:
    """Of an input or output that carries the value of `site`."""
    return f"cache.{site.name}"


def _planned(
    variant: Variant,
    captured: Captured,
    sized: Variant,
    call: Call,
    names: tuple[str, ...],
    live: Mapping[str, torch.Tensor],
    units: Mapping[str, int],
) -> PlannedGraph:
    constants = variant.program.constants
    own = dict(zip(captured.input_names, names, strict=True))
    return PlannedGraph(
        graph_name(variant.phase),
        variant,
        captured,
        sized,
        dict(zip(names, call.leaves, strict=True)),
        tuple(own[name] for name in variant.inputs),
        tuple(live[name] if name in live else constants[name] for name in variant.weights),
        units,
    )


def _emission_name(emission: Emission, whole: set[tuple[Kind, str]]) -> str:
    """A graph may hand on a value both whole and merged."""
    site = emission.site
    return cache_name(site) + (".merged" if emission.merged and (site.kind, site.name) in whole else "")
