"""The graphs that a bundle holds: their inputs and outputs, the sizes that stay free, and what they cost."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from diffusers.utils import BaseOutput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tgate_compile._errors import BundleError, CaptureError, first_line
from tgate_compile.bundle.manifest import CacheInput, CacheOutput, Facts, Graph, Returns, TensorSpec, phase_spec
from tgate_compile.bundle.read_manifest import Size, shape_at
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.engine.call import Call
from tgate_compile.engine.free_sizes import SYMBOLS, FreeSize, free_shapes
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.editing import outputs_of, shape_of
from tgate_compile.passes.graphs import Captured, Emission, Site, Variant
from tgate_compile.pipeline.generation import Plan
from tgate_compile.pipeline.hook import GatedDenoiser


def argument_names(call: Call, forward: Callable[..., Any]) -> tuple[str, ...]:
    """For each leaf of `call`, in order, the parameter of `forward` that it is, and its path inside of it."""
    parameters = list(inspect.signature(forward).parameters)
    leaves, _ = pytree.tree_flatten_with_path(call.arguments)
    return tuple(_name(path, parameters) for path, _ in leaves)


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    (part, first, *rest) = [_key(step) for step in path]
    positional = part == 0
    return ".".join(str(step) for step in (parameters[first] if positional else first, *rest))


def _key(step: Any) -> Any:
    return step.idx if isinstance(step, pytree.SequenceKey) else getattr(step, "key", None) or getattr(step, "name", "")


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
    """Return `full`, `pruned`, `pruned-self-reused`; the less common of the two batches says so: `full-unguided`.

    Most graphs that reuse cross-attention run after a gate, without guidance; the others run under guidance.
    """
    name = phase.name.replace(", ", "-")
    if phase.guided == ("cross" not in phase.reuse):
        return name
    return f"{name}-guided" if phase.guided else f"{name}-unguided"


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


#: Where in the latents' shape each free size is.
LATENTS_DIMENSION: Mapping[str, int] = {SYMBOLS["batch"]: 0, SYMBOLS["height"]: -2, SYMBOLS["width"]: -1}


def describe_graph(planned: PlannedGraph, file: str, entry: str | None, nodes: int) -> Graph:
    """The graph in `file`, of so many operators; its parity is not measured yet."""
    variant = planned.variant
    program = variant.program
    symbols = symbols_of(planned)
    placeholders = inputs_of(planned)
    inputs = [_spec(name, node, symbols) for name, node in zip(planned.input_names, placeholders, strict=True)]
    returns = outputs_of(program.graph)
    outputs = [_spec(name, node, symbols) for name, node in zip(planned.output_names, returns, strict=True)]
    own, returned = len(variant.inputs), len(outputs) - len(variant.emitted)
    parameters = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    macs = count_macs(planned.sized.program.graph)
    return Graph(
        file=file,
        entry=entry,
        phase=phase_spec(variant.phase),
        inputs=[TensorSpec(**spec) for spec in inputs[:own]],
        cache_inputs=[
            CacheInput(**spec, kind=site.kind, site=site.name)
            for spec, site in zip(inputs[own:], variant.reused, strict=True)
        ],
        outputs=[TensorSpec(**spec) for spec in outputs[:returned]],
        cache_outputs=[
            CacheOutput(**spec, kind=emission.site.kind, site=emission.site.name, merged=emission.merged)
            for spec, emission in zip(outputs[returned:], variant.emitted, strict=True)
        ],
        parity=None,
        facts=Facts(
            nodes=nodes,
            parameters=sum(program.state_dict[str(spec.target)].numel() for spec in parameters),
            macs=macs.layers,
            macs_total=macs.total,
        ),
    )


def inputs_of(planned: PlannedGraph) -> list[torch.fx.Node]:
    """The nodes of the graph's inputs, caches last, weights left out."""
    variant = planned.variant
    return [node for node in variant.program.graph.nodes if node.op == "placeholder"][len(variant.weights) :]


def symbols_of(planned: PlannedGraph) -> dict[sympy.Symbol, str]:
    """The manifest's names for the free sizes of the graph, by torch's symbols, as the latents' shape shows them."""
    latents = inputs_of(planned)[planned.variant.inputs.index(planned.captured.latents)]
    shape = shape_of(latents)
    symbols: dict[sympy.Symbol, str] = {}
    for name in planned.units:
        size = shape[LATENTS_DIMENSION[name]]
        assert isinstance(size, torch.SymInt), f"{name} was left free, and is {size}"
        (symbol,) = size.node.expr.free_symbols
        symbols[symbol] = name
    return symbols


def size_of(size: int | torch.SymInt, symbols: Mapping[sympy.Symbol, str]) -> Size:
    """`size` as the manifest says it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.subs({symbol: sympy.Symbol(name, integer=True) for symbol, name in symbols.items()})
    return int(expression) if expression.is_number else str(expression)


def _spec(name: str, node: torch.fx.Node, symbols: Mapping[sympy.Symbol, str]) -> dict[str, Any]:
    value: torch.Tensor = node.meta["val"]
    return {"name": name, "dtype": dtype_name(value.dtype), "shape": [size_of(size, symbols) for size in value.shape]}


logger = logging.getLogger(__name__)

#: What is tried, one after the other. Some transformers have tables of positions for one size.
ATTEMPTS: tuple[tuple[FreeSize, ...], ...] = (("batch", "height", "width"), ("batch",))

MSG_NOT_FREE = (
    "{model} cannot be exported with these sizes left to each call: {free}. At {sizes} its graph fails ({error}). "
    "Leave out dynamic, or name fewer of them."
)


def choose_sizes(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize] | None) -> dict[Phase, PlannedGraph]:
    """The graphs of `plan` with the sizes `free`, seen to work at other sizes than the call's.

    None leaves free what the denoiser's code permits: batch, height and width, or the batch alone, or nothing.

    Raises:
        CaptureError: the denoiser's code depends on one of `free`.
    """
    if free is not None:
        return _checked(hook, plan, free)
    for attempt in ATTEMPTS:
        try:
            return _checked(hook, plan, attempt)
        except CaptureError as error:
            logger.info("%s cannot leave %s free: %s", type(hook.denoiser).__name__, ", ".join(attempt), error)
    return planned_graphs(hook, plan, ())


def example_sizes(planned: PlannedGraph) -> dict[str, int]:
    """The free sizes of the call that `planned` is made for."""
    latents = planned.example_inputs[planned.own_names.index(planned.latents)]
    return {name: latents.shape[LATENTS_DIMENSION[name]] // unit for name, unit in planned.units.items()}


def other_sizes(example: Mapping[str, int]) -> dict[str, int]:
    """More prompts, and half the height: no larger than the call's own."""
    other = dict(example)
    if SYMBOLS["batch"] in other:
        other[SYMBOLS["batch"]] += 1
    if SYMBOLS["height"] in other:
        other[SYMBOLS["height"]] = other[SYMBOLS["height"]] // 2 or 2
    return other


def _checked(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize]) -> dict[Phase, PlannedGraph]:
    graphs = planned_graphs(hook, plan, free)
    for planned in graphs.values():
        if planned.units:
            sizes = other_sizes(example_sizes(planned))
            try:
                with _without_torch_log():
                    _run_without_numbers(planned, sizes)
            except Exception as error:  # whatever an operator raises
                shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
                told = {"free": ", ".join(free), "sizes": shown, "error": first_line(error)}
                raise CaptureError(MSG_NOT_FREE.format(model=type(hook.denoiser).__name__, **told)) from error
    return graphs


@contextmanager
def _without_torch_log() -> Iterator[None]:
    """torch writes a traceback into its log before it raises the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was


def _run_without_numbers(planned: PlannedGraph, sizes: Mapping[str, int]) -> None:
    """Run the graph on shapes alone. torch.export lets a table of 16 positions be added to `h*w` values."""
    symbols = symbols_of(planned)
    with torch.no_grad(), FakeTensorMode() as mode:
        weights = [mode.from_tensor(weight) for weight in planned.weights]
        inputs = []
        for node in inputs_of(planned):
            value = node.meta["val"]
            shape = shape_at([size_of(size, symbols) for size in value.shape], sizes)
            inputs.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        planned.variant.program.graph_module(*weights, *inputs)


def returns_of(spec: pytree.TreeSpec) -> Returns | None:
    """What `spec` puts outputs into; None if it is neither."""
    if spec == pytree.tree_structure(tuple(range(spec.num_leaves))):
        return Returns(class_name=None, fields=[])
    is_output = isinstance(spec.type, type) and issubclass(spec.type, BaseOutput)
    if is_output and len(spec.context) == spec.num_leaves:
        return Returns(class_name=spec.type.__name__, fields=list(spec.context))
    return None


def unflatten_as(returns: Returns, denoiser: torch.nn.Module, version: str) -> Callable[[Sequence[torch.Tensor]], Any]:
    """A function that puts outputs into what `denoiser` returns; `version` of diffusers is only told in the error.

    Raises:
        BundleError: there is no such class beside that of the denoiser.
    """
    if returns.class_name is None:
        return tuple
    module = type(denoiser).__module__
    found = getattr(sys.modules[module], returns.class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseOutput)):
        raise BundleError(
            f"The bundle's denoiser returns a {returns.class_name}, and {module} has no such output class. Its "
            f"diffusers was {version}."
        )
    return lambda outputs: found(**dict(zip(returns.fields, outputs, strict=True)))
