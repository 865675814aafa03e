"""Plan the graphs of a bundle: their inputs and outputs, the sizes that stay free, and their costs."""

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
from tgate_compile.engine.capture import SYMBOLS, FreeSize, free_shapes
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.graphs import Captured, Emission, Site, Variant, outputs_of, shape_of
from tgate_compile.pipeline.generation import Plan
from tgate_compile.pipeline.hook import GatedDenoiser


def argument_names(call: Call, forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return a name for each leaf of `call`, in order: the parameter of `forward`, and the path inside of it."""
    parameters = list(inspect.signature(forward).parameters)
    leaves, _ = pytree.tree_flatten_with_path(call.arguments)
    return tuple(_name(path, parameters) for path, _ in leaves)


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    (part, first, *rest) = [_key(step) for step in path]
    positional = part == 0
    return ".".join(str(step) for step in (parameters[first] if positional else first, *rest))


def _key(step: Any) -> Any:
    return step.idx if isinstance(step, pytree.SequenceKey) else getattr(step, "key", None) or getattr(step, "name", "")


#: The names that denoisers have for their timestep.
TIMESTEPS = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class PlannedGraph:
    """A variant to be written.

    Attributes:
        name: the name of the graph and of its file.
        variant: the graph, with free sizes.
        captured: the captured program that the variant is derived from.
        sized: the graph for the shapes of the example call only.
        arguments: the arguments of the denoiser's call, by name.
        own_names: the names of the variant's inputs in the bundle, without caches.
        weights: the weights of the variant, in its order; the denoiser's own tensors, not copies.
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
        """The names of all inputs, caches last."""
        return (*self.own_names, *(cache_name(site) for site in self.variant.reused))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of all outputs, caches last."""
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
        """The inputs of the example call, without caches."""
        values = [self.arguments[name] for name in self.own_names]
        return [value for value in values if isinstance(value, torch.Tensor)]


def planned_graphs(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize]) -> dict[Phase, PlannedGraph]:
    """Return the graphs of `plan` with the free sizes `free`, by the phase that each serves.

    Raises:
        CaptureError: torch.export finds that the denoiser's code depends on one of these sizes.
    """
    assert isinstance(hook.store, VariantStore)
    live = live_tensors(hook.denoiser)
    calls: dict[Hashable, Call] = {call.key: call for _, call in plan.graphs}
    phases = dict.fromkeys((phase, call.key) for phase, call in plan.graphs)
    graphs = {}
    for key, call in calls.items():
        served = [phase for phase, call_key in phases if call_key == key and phase not in graphs]
        sized = [hook.store.variant(phase, call, hook.own_forward)[0] for phase in served]
        names = argument_names(call, hook.own_forward)
        call = _with_float_timestep(call, names)
        guided = {phase.guided for phase in served} == {True}
        shapes = free_shapes(hook.denoiser, hook.own_forward, call, hook.config.family, guided=guided, free=free)
        variants, captured = hook.store.free_variants(served, shapes.call, hook.own_forward, shapes.shapes)
        for phase, variant, static in zip(served, variants, sized, strict=True):
            graphs[phase] = _planned(variant, captured, static, call, names, live, shapes.units)
    return {phase: graphs[phase] for phase, _ in phases}


def _with_float_timestep(call: Call, names: Sequence[str]) -> Call:
    """Return `call` with a float32 timestep, so that one graph serves schedulers with integer and fractional timesteps.

    Denoisers convert the timestep to float first anyway.
    """
    leaves = [
        leaf.float() if name in TIMESTEPS and torch.is_tensor(leaf) and not leaf.is_floating_point() else leaf
        for name, leaf in zip(names, call.leaves, strict=True)
    ]
    return Call(tuple(leaves), call.spec)


def graph_name(phase: Phase) -> str:
    """Return the name of the graph for `phase`, such as `full`, `pruned` or `full-unguided`.

    The name mentions guidance only in the less common case: most graphs that reuse cross-attention run after a gate,
    without guidance; the others run with guidance.
    """
    name = phase.name.replace(", ", "-")
    if phase.guided == ("cross" not in phase.reuse):
        return name
    return f"{name}-guided" if phase.guided else f"{name}-unguided"


def cache_name(site: Site) -> str:
    """Return the name of an input or output that carries the value of `site`."""
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
    """Return the name of an output, which marks a merged value if the graph also emits the whole value."""
    site = emission.site
    return cache_name(site) + (".merged" if emission.merged and (site.kind, site.name) in whole else "")


#: The dimension of the latents that each free size belongs to.
LATENTS_DIMENSION: Mapping[str, int] = {SYMBOLS["batch"]: 0, SYMBOLS["height"]: -2, SYMBOLS["width"]: -1}


def describe_graph(planned: PlannedGraph, file: str, entry: str | None, nodes: int) -> Graph:
    """Return the manifest's description of a graph in `file` with `nodes` operators, without its parity."""
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
    """Return the placeholders of the graph's inputs, caches last, without weights."""
    variant = planned.variant
    return [node for node in variant.program.graph.nodes if node.op == "placeholder"][len(variant.weights) :]


def symbols_of(planned: PlannedGraph) -> dict[sympy.Symbol, str]:
    """Return the manifest's names for the free sizes of the graph, by torch's symbols in the latents' shape."""
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
    """Return `size` in the manifest's notation."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.subs({symbol: sympy.Symbol(name, integer=True) for symbol, name in symbols.items()})
    return int(expression) if expression.is_number else str(expression)


def _spec(name: str, node: torch.fx.Node, symbols: Mapping[sympy.Symbol, str]) -> dict[str, Any]:
    value: torch.Tensor = node.meta["val"]
    return {"name": name, "dtype": dtype_name(value.dtype), "shape": [size_of(size, symbols) for size in value.shape]}


logger = logging.getLogger(__name__)

#: The sets of free sizes to try, in this order. Some transformers have position tables for only one size.
ATTEMPTS: tuple[tuple[FreeSize, ...], ...] = (("batch", "height", "width"), ("batch",))


def choose_sizes(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize] | None) -> dict[Phase, PlannedGraph]:
    """Return the graphs of `plan` with the free sizes `free`, after running them at other sizes than the call's.

    If `free` is None, as many sizes are free as the denoiser's code permits: batch, height and width, only the batch,
    or none.

    Raises:
        CaptureError: the denoiser's code depends on one of `free`.
    """
    if free is not None:
        return _checked(hook, plan, free)
    for attempt in ATTEMPTS:
        try:
            return _checked(hook, plan, attempt)
        except CaptureError as error:
            sizes = ", ".join(attempt)
            logger.info("%s does not work with these free sizes: %s (%s)", type(hook.denoiser).__name__, sizes, error)
    return planned_graphs(hook, plan, ())


def example_sizes(planned: PlannedGraph) -> dict[str, int]:
    """Return the values of the free sizes in the example call of `planned`."""
    latents = planned.example_inputs[planned.own_names.index(planned.latents)]
    return {name: latents.shape[LATENTS_DIMENSION[name]] // unit for name, unit in planned.units.items()}


def other_sizes(example: Mapping[str, int]) -> dict[str, int]:
    """Return sizes that differ from `example`: a larger batch, and half the height to limit the cost."""
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
                raise CaptureError(
                    f"{type(hook.denoiser).__name__} cannot be exported with these free sizes: {', '.join(free)}. At "
                    f"{shown} its graph fails ({first_line(error)}). Leave dynamic out, or name fewer sizes."
                ) from error
    return graphs


@contextmanager
def _without_torch_log() -> Iterator[None]:
    """Disable the log in which torch writes a traceback before it raises the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was


def _run_without_numbers(planned: PlannedGraph, sizes: Mapping[str, int]) -> None:
    """Run the graph on shapes only.

    torch.export does not find every mistake: it permits adding a table of 16 positions to `h*w` values.
    """
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
    """Return the container of the outputs in `spec`, or None if it is neither a tuple nor an output class."""
    if spec == pytree.tree_structure(tuple(range(spec.num_leaves))):
        return Returns(class_name=None, fields=[])
    is_output = isinstance(spec.type, type) and issubclass(spec.type, BaseOutput)
    if is_output and len(spec.context) == spec.num_leaves:
        return Returns(class_name=spec.type.__name__, fields=list(spec.context))
    return None


def unflatten_as(returns: Returns, denoiser: torch.nn.Module, version: str) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Return a function that packs a sequence of outputs into the type that `denoiser` returns.

    Raises:
        BundleError: the denoiser's module does not have the output class. The message names the diffusers `version`.
    """
    if returns.class_name is None:
        return tuple
    module = type(denoiser).__module__
    found = getattr(sys.modules[module], returns.class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseOutput)):
        raise BundleError(
            f"The denoiser of the bundle returns a {returns.class_name}, but {module} has no such output class. The "
            f"bundle was exported with diffusers {version}."
        )
    return lambda outputs: found(**dict(zip(returns.fields, outputs, strict=True)))
