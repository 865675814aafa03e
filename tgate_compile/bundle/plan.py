"""Plan the graphs of a bundle: their inputs and outputs, the sizes that stay free, and their costs."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import sympy  # type: ignore[import-untyped]
import torch
from diffusers.utils import BaseOutput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tgate_compile._errors import BundleError, CaptureError, first_line
from tgate_compile.bundle.component_recipes import TIMESTEPS, binding_in_bundle
from tgate_compile.bundle.manifest import (
    CacheInput,
    CacheOutput,
    Dtype,
    EarlyInput,
    Facts,
    Graph,
    Returns,
    Stage,
    TensorSpec,
    phase_spec,
)
from tgate_compile.bundle.read_manifest import Size, names_in, shape_at, solvable_names
from tgate_compile.bundle.weights import dtype_name
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import SYMBOLS, TEXT_ARGUMENT, FreeSize, free_shapes
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.binding_times import EarlyVariant, split_by_binding
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.graphs import Captured, Emission, Site, Variant, copy_graph, outputs_of, shape_of
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.progress import Plan


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


@dataclass(frozen=True)
class PlannedGraph:
    """A variant to be written, or a part of one.

    Attributes:
        name: the name of the graph and of its file.
        variant: the graph, with free sizes.
        captured: the captured program that the variant is derived from.
        arguments: the arguments of the denoiser's call, by name.
        names: the names of the arguments in the bundle, by those of the graph's inputs.
        weights: the weights of the variant, in its order; the denoiser's own tensors, not copies.
        units: see `FreeShapes`; empty if no size is free.
        image: see `Call`.
        stage: whether it is the prelude or the table of a variant, or the step: the rest, or all of it.
        early: the prelude and the table that return some of its inputs.
    """

    name: str
    variant: Variant
    captured: Captured
    arguments: Mapping[str, object]
    names: Mapping[str, str]
    weights: tuple[torch.Tensor, ...]
    units: Mapping[str, int]
    image: tuple[int, int, int] | None = None
    stage: Stage = "step"
    early: tuple[PlannedGraph, ...] = ()

    @property
    def parts(self) -> tuple[PlannedGraph, ...]:
        """The graphs to write for it, in the order in which they run."""
        return (*self.early, self)

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names in the bundle of the inputs that are arguments of the denoiser, which come first."""
        return tuple(self.names[name] for name in self.variant.inputs if name in self.names)

    @property
    def early_names(self) -> tuple[str, ...]:
        """The names of the inputs that `early` returns, which come next."""
        return tuple(name for name in self.variant.inputs if name not in self.names)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of all inputs, caches last."""
        return (*self.own_names, *self.early_names, *(cache_name(site) for site in self.variant.reused))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of all outputs, caches last."""
        if isinstance(self.variant, EarlyVariant):
            return self.variant.outputs
        count = self.captured.outputs_of(self.variant.phase)
        first = "measure" if self.variant.phase.part == "head" else "out_sample"
        own = [first, *(f"out_{i}" for i in range(1, count))]
        whole = {(emission.site.kind, emission.site.name) for emission in self.variant.emitted if not emission.merged}
        taken = {(site.kind, site.name) for site in self.variant.reused}
        return (*own, *(_emission_name(emission, whole, taken) for emission in self.variant.emitted))

    @property
    def latents(self) -> str:
        """The argument that carries the latents."""
        return self.names[self.captured.latents]

    @property
    def example_inputs(self) -> list[torch.Tensor]:
        """The inputs of the example call that are arguments of the denoiser."""
        values = [self.arguments[name] for name in self.own_names]
        return [value for value in values if isinstance(value, torch.Tensor)]

    @property
    def device(self) -> torch.device:
        """The device of the example call. A part of a step may take none of its tensors."""
        latents = self.arguments[self.latents]
        assert isinstance(latents, torch.Tensor)
        return latents.device

    def early_values(self, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what `early` computes from `known`, the arguments of a call by name; on the device of the weights."""
        values: dict[str, torch.Tensor] = {}
        for part in self.early:
            dtypes = [node.meta["val"].dtype for node in inputs_of(part)]
            given = [
                {**known, **values}[name].to(self.device, dtype)
                for name, dtype in zip(part.input_names, dtypes, strict=True)
            ]
            with torch.no_grad():
                results = part.variant.program.graph_module(*part.weights, *given)
            values |= zip(part.output_names, results, strict=True)
        return values


def planned_graphs(
    hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize], *, split: bool = False
) -> dict[Phase, PlannedGraph]:
    """Return the graphs of `plan` with the free sizes `free`, by the phase that each serves.

    With `split`, they are split by binding time if a bundle can represent the parts.

    Raises:
        CaptureError: torch.export finds that the denoiser's code depends on one of these sizes.
    """
    assert isinstance(hook.store, VariantStore)
    live = live_tensors(hook.denoiser)
    every = [graph for of_step in plan.graphs for graph in of_step]
    calls: dict[Hashable, Call] = {call.key: call for _, call in every}
    phases = dict.fromkeys((phase, call.key) for phase, call in every)
    graphs = {}
    for key, call in calls.items():
        served = [phase for phase, call_key in phases if call_key == key and phase not in graphs]
        names = argument_names(call, hook.own_forward)
        call = _with_float_timestep(call, names)
        guided = {phase.guided for phase in served} == {True}
        shapes = free_shapes(hook.denoiser, hook.own_forward, call, hook.config.family, guided=guided, free=free)
        variants, captured = hook.store.free_variants(served, shapes.call, hook.own_forward, shapes.shapes)
        for phase, variant in zip(served, variants, strict=True):
            planned = _planned(graph_name(phase), variant, captured, call, names, live, shapes.units)
            graphs[phase] = _split(planned, live) if split else planned
    return {phase: graphs[phase] for phase, _ in phases}


def _with_float_timestep(call: Call, names: Sequence[str]) -> Call:
    """Return `call` with a float32 timestep, so that one graph serves schedulers with integer and fractional timesteps.

    Denoisers convert the timestep to float first anyway.
    """
    leaves = [
        leaf.float() if name in TIMESTEPS and torch.is_tensor(leaf) and not leaf.is_floating_point() else leaf
        for name, leaf in zip(names, call.leaves, strict=True)
    ]
    return replace(call, leaves=tuple(leaves))


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
    name: str,
    variant: Variant,
    captured: Captured,
    call: Call,
    names: tuple[str, ...],
    live: Mapping[str, torch.Tensor],
    units: Mapping[str, int],
) -> PlannedGraph:
    return PlannedGraph(
        name,
        variant,
        captured,
        dict(zip(names, call.leaves, strict=True)),
        dict(zip(captured.input_names, names, strict=True)),
        _weights_of(variant, live),
        units,
        call.image,
    )


def _weights_of(variant: Variant, live: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    constants = variant.program.constants
    return tuple(live[name] if name in live else constants[name] for name in variant.weights)


def _split(whole: PlannedGraph, live: Mapping[str, torch.Tensor]) -> PlannedGraph:
    """Return `whole` split by binding time, or unchanged if a bundle cannot represent the parts."""
    roles = {name: binding_in_bundle(named) for name, named in whole.names.items()}
    split = split_by_binding(whole.variant, roles)

    def part(variant: Variant, stage: Stage, early: tuple[PlannedGraph, ...]) -> PlannedGraph:
        name = whole.name if stage == "step" else f"{whole.name}-{stage}"
        weights = _weights_of(variant, live)
        return replace(whole, name=name, variant=variant, weights=weights, stage=stage, early=early)

    early: tuple[PlannedGraph, ...] = ()
    if split.prelude is not None:
        early = (part(split.prelude, "prelude", ()),)
    if split.table is not None:
        taken = early if {name for each in early for name in each.output_names} & set(split.table.inputs) else ()
        early = (*early, part(split.table, "table", taken))
    problem = next((problem for each in early if (problem := _not_representable(each))), None)
    if problem is not None:
        logger.info("the %s graph is not split by binding time: %s", whole.name, problem)
        return whole
    return part(split.step, "step", early)


def _not_representable(part: PlannedGraph) -> str | None:
    """Return why a manifest cannot describe a prelude or a table; None if it can."""
    symbols = symbols_of(part)
    shapes = [[size_of(size, symbols) for size in shape_of(node)] for node in inputs_of(part)]
    for name, node in zip(part.output_names, outputs_of(part.variant.program.graph), strict=True):
        if dtype_name(node.meta["val"].dtype) not in get_args(Dtype):
            return f"{name} is {node.meta['val'].dtype}"
        unknown = names_in([size_of(size, symbols) for size in shape_of(node)]) - solvable_names(shapes)
        if unknown:
            return f"the inputs of {part.name} do not determine {', '.join(sorted(unknown))} in the shape of {name}"
    return None


def _emission_name(emission: Emission, whole: set[tuple[Kind, str]], taken: set[tuple[Kind, str]]) -> str:
    """Return the name of an output.

    It marks a merged value if the graph also emits the whole value, and a new one if the graph takes an earlier one.
    """
    key = emission.site.kind, emission.site.name
    mark = ".merged" if emission.merged and key in whole else ".new" if key in taken else ""
    return cache_name(emission.site) + mark


#: The dimension that each free size is: of the text, or else of the latents.
_DIMENSION: Mapping[str, int] = {SYMBOLS["batch"]: 0, SYMBOLS["height"]: -2, SYMBOLS["width"]: -1, SYMBOLS["text"]: 1}


def describe_graph(planned: PlannedGraph, file: str, entry: str | None, nodes: int) -> Graph:
    """Return the manifest's description of a graph in `file` with `nodes` operators, without its parity."""
    variant = planned.variant
    program = variant.program
    symbols = symbols_of(planned)
    placeholders = inputs_of(planned)
    inputs = [_spec(name, node, symbols) for name, node in zip(planned.input_names, placeholders, strict=True)]
    returns = outputs_of(program.graph)
    outputs = [_spec(name, node, symbols) for name, node in zip(planned.output_names, returns, strict=True)]
    own, given = len(planned.own_names), len(variant.inputs)
    returned = len(outputs) - len(variant.emitted)
    makers = {name: part.name for part in planned.early for name in part.output_names}
    parameters = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    macs = count_macs(_at_sizes(planned, example_sizes(planned)) if planned.units else program.graph)
    return Graph(
        file=file,
        entry=entry,
        phase=phase_spec(variant.phase),
        stage=planned.stage,
        inputs=[TensorSpec(**spec) for spec in inputs[:own]],
        early_inputs=[EarlyInput(**spec, graph=makers[spec["name"]]) for spec in inputs[own:given]],
        cache_inputs=[
            CacheInput(**spec, kind=site.kind, site=site.name)
            for spec, site in zip(inputs[given:], variant.reused, strict=True)
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
    nodes = {planned.names.get(node.name): node for node in planned.captured.program.graph.nodes}
    symbols: dict[sympy.Symbol, str] = {}
    for name in planned.units:
        size = shape_of(nodes[_argument_of(planned, name)])[_DIMENSION[name]]
        assert isinstance(size, torch.SymInt), f"{name} was left free, and is {size}"
        (symbol,) = size.node.expr.free_symbols
        symbols[symbol] = name
    return symbols


def _argument_of(planned: PlannedGraph, name: str) -> str:
    """Return the argument whose shape has the free size `name`."""
    return TEXT_ARGUMENT if name == SYMBOLS["text"] else planned.latents


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


def choose_sizes(
    hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize] | None, *, split: bool
) -> dict[Phase, PlannedGraph]:
    """Return the graphs of `plan` with the free sizes `free`, after running them at other sizes than the call's.

    If `free` is None, as many sizes are free as the denoiser's code permits: batch, height and width, only the batch,
    or none. With `split`, the graphs are split by binding time.

    Raises:
        CaptureError: the denoiser's code depends on one of `free`.
    """
    if free is not None:
        return _checked(hook, plan, free, split=split)
    for attempt in ATTEMPTS:
        try:
            return _checked(hook, plan, attempt, split=split)
        except CaptureError as error:
            sizes = ", ".join(attempt)
            logger.info("%s does not work with these free sizes: %s (%s)", type(hook.denoiser).__name__, sizes, error)
    return planned_graphs(hook, plan, (), split=split)


def example_sizes(planned: PlannedGraph) -> dict[str, int]:
    """Return the values of the free sizes in the example call of `planned`."""
    found = {}
    for name, unit in planned.units.items():
        value = planned.arguments[_argument_of(planned, name)]
        assert isinstance(value, torch.Tensor)
        found[name] = value.shape[_DIMENSION[name]] // unit
    return found


def other_sizes(example: Mapping[str, int]) -> dict[str, int]:
    """Return sizes that differ from `example`: a larger batch, a longer text, and half the height to limit the cost."""
    other = dict(example)
    if SYMBOLS["batch"] in other:
        other[SYMBOLS["batch"]] += 1
    if SYMBOLS["text"] in other:
        other[SYMBOLS["text"]] += 1
    if SYMBOLS["height"] in other:
        other[SYMBOLS["height"]] = other[SYMBOLS["height"]] // 2 or 2
    return other


def _checked(hook: GatedDenoiser, plan: Plan, free: Collection[FreeSize], *, split: bool) -> dict[Phase, PlannedGraph]:
    graphs = planned_graphs(hook, plan, free, split=split)
    for planned in (part for whole in graphs.values() for part in whole.parts):
        if planned.units:
            sizes = other_sizes(example_sizes(planned))
            try:
                with _without_torch_log():
                    _at_sizes(planned, sizes)
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


def _at_sizes(planned: PlannedGraph, sizes: Mapping[str, int]) -> torch.fx.Graph:
    """Return a copy of the graph with fake tensors of these sizes, after running it on shapes only.

    torch.export does not find every mistake: it permits adding a table of 16 positions to `h*w` values.
    """
    graph_module = copy_graph(planned.variant.program.graph_module)
    symbols = symbols_of(planned)
    with torch.no_grad(), FakeTensorMode() as mode:
        weights = [mode.from_tensor(weight) for weight in planned.weights]
        inputs = []
        for node in inputs_of(planned):
            value = node.meta["val"]
            shape = shape_at([size_of(size, symbols) for size in value.shape], sizes)
            inputs.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        _Shapes(graph_module).run(*weights, *inputs)
    return graph_module.graph


class _Shapes(torch.fx.Interpreter):
    """Runs a graph, and stores each node's result in its `meta["val"]`."""

    def run_node(self, node: torch.fx.Node) -> Any:
        result = node.meta["val"] = super().run_node(node)
        return result


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
