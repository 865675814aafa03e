"""Captured graphs and their variants, and helpers for passes that edit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from tgate_compile.methods.method import Kind, Phase


@dataclass(frozen=True)
class PassResult:
    """The result of a pass.

    Attributes:
        changes: the number of places that the pass changed; 0 means that the graph is unchanged.
    """

    changes: int


def add_call(
    graph: torch.fx.Graph, target: torch._ops.OpOverload, source: Node, *args: object, **kwargs: object
) -> Node:
    """Insert a node that calls `target` on `source` and further arguments, which may be nodes or constants."""
    node = graph.call_function(target, (source, *args), kwargs)  # type: ignore[arg-type]
    fake = source.meta["val"]
    with fake.fake_mode:
        node.meta["val"] = target(fake, *(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)
    return node


def operand(node: Node, position: int) -> Node:
    """Return the positional argument `position` of `node`, which must be a node."""
    value = node.args[position]
    assert isinstance(value, Node), f"{node.format_node()}: argument {position} is not a node"
    return value


def argument(node: Node, position: int, name: str, default: object = None) -> object:
    """Return the argument `name` of `node`, passed by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def outputs_of(graph: torch.fx.Graph) -> tuple[Node, ...]:
    """Return the values that `graph` returns, which must be one flat tuple."""
    values = graph.output_node().args[0]
    assert isinstance(values, (tuple, list)), "the graph's output is not flat"
    return tuple(value for value in values if isinstance(value, Node))


def shape_of(node: Node) -> torch.Size:
    """Return the shape of the value of `node`."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def is_mutable(node: Node) -> bool:
    """Return whether `node` writes into one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def copy_graph(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return `graph_module` with a copy of its graph that can be changed; submodules and fake tensors are shared.

    The output of the graph must be a flat tuple, and so is the output of the copy. Its Python code is generated when it
    first runs: most copies never do, since a pass changes them or a program is made of them.
    """
    graph = torch.fx.Graph()
    output = graph.graph_copy(graph_module.graph, val_map={})  # each node gets a dictionary `meta` of its own
    graph.output(tuple(output))  # type: ignore[arg-type]
    return _LazyGraphModule(graph_module, graph)


def flat_program(source: ExportedProgram, graph_module: torch.fx.GraphModule) -> ExportedProgram:
    """Return an exported program of `graph_module` that takes flat tensors and returns a flat tuple.

    It has only the part of the state of `source` that the graph uses. Parameters are shared with `source`, not copied.
    """
    specs = {spec.arg.name: spec for spec in source.graph_signature.input_specs}
    inputs = [
        specs.get(node.name) or InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), target=None)
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
    ]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), target=None)
        for node in outputs_of(graph_module.graph)
    ]
    used = {spec.target for spec in inputs}
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: tensor for name, tensor in source.state_dict.items() if name in used},
        range_constraints=source.range_constraints,
        module_call_graph=flat_call(inputs, outputs),
        constants={name: value for name, value in source.constants.items() if name in used},
        verifiers=source.verifiers,
    )


def flat_call(inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec]) -> list[ModuleCallEntry]:
    """Return the call graph of a program that takes its user inputs as flat arguments and returns a flat tuple."""
    names = [spec.arg.name for spec in inputs if spec.kind is InputKind.USER_INPUT]
    signature = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((tuple(range(len(names))), {})),
        out_spec=pytree.tree_structure(tuple(range(len(outputs)))),
        forward_arg_names=names,
    )
    return [ModuleCallEntry(fqn="", signature=signature)]


@dataclass(frozen=True)
class Site:
    """A value inside the denoiser that can be cached and reused.

    Attributes:
        kind: the kind of the value.
        name: the path of the module that produces it, e.g. `mid_block.attentions.0.transformer_blocks.0.attn2`;
            with a number, as in `block#2`, if that module has several attentions or is called several times. Keys and
            values of a joint attention have its path and an ending, as in `transformer_blocks.0.attn.key`.
        node: the name of its node in the captured graph.
        shape: the shape of the cached value, [batch, tokens, dim] (batch 2B under guidance).
        dtype: the dtype of the value in the graph.
        cache_dtype: the dtype of the cached value.
        batch: the batch dimension in the graph; in the cached value it is always the first.
        of_text: whether it is the keys or values of some of the tokens in a joint attention: the text's, or those of
            reference images.
        base: for a residual: the name of the node that is subtracted from the value when it is cached, and that the
            cached value is added to when it is reused.
    """

    kind: Kind
    name: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    batch: int = 0
    of_text: bool = False
    base: str | None = None

    @property
    def nbytes(self) -> int:
        """The size of the cached value, in bytes."""
        return prod(self.shape) * self.cache_dtype.itemsize


#: How often an input of the denoiser changes: once per generation, once per timestep, or at every call.
Binding = Literal["prompt", "timestep", "latents"]


@dataclass(frozen=True)
class Origins:
    """The inputs of a graph that its tokens come from.

    Attributes:
        latents: the names of the inputs that the image's tokens come from.
        times: the names of the inputs that hold the timestep. A token made of it alone is one of the image's.
        conditions: the names of all other inputs.
        image: the rows of the latents that are the image's: their dimension, the first one, and the one after the last.
            All others are those of reference images. None means that all rows are the image's.
    """

    latents: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    image: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Captured:
    """A denoiser as one graph, for inputs of one shape.

    Attributes:
        program: the exported program, which shares the parameters of the user's module.
        input_names: the names of the graph's inputs, for each leaf of the call's (args, kwargs) in pytree order.
        latents: the name of the input that carries the latents.
        out_spec: the pytree structure of the denoiser's return value.
        sites: the values that can be cached, grouped by kind and in graph order.
        roles: how often each of the inputs changes, by name; inputs without an entry change at every call.
        separated: for joint attention: the graph with its tokens separated (`separate_tokens`), from which graphs that
            reuse keys and values are derived. Its inputs, outputs and sites have the names of the program's.
        origins: for joint attention: the inputs that the tokens come from; None if only some of the sites are cached,
            so that all tokens are still needed.
        constant: for joint attention: whether the text's keys and values depend on nothing that changes from step to
            step. All graphs are then derived from a graph that computes them apart.
        separated_sites: for joint attention: the sites of `separated` besides the keys and values, as they are once
            these tokens are gone. They have names of their own, unless the text is constant: then all graphs have
            these sites.
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    latents: str
    out_spec: pytree.TreeSpec
    sites: tuple[Site, ...]
    roles: Mapping[str, Binding] = field(default_factory=dict)
    separated: torch.fx.GraphModule | None = None
    origins: Origins | None = None
    constant: bool = False
    separated_sites: tuple[Site, ...] = ()

    def outputs_of(self, phase: Phase) -> int:
        """Return the number of outputs of the graph of `phase` that come before the cached values.

        They are those of the denoiser, or for the head of a step that is decided at run time, the measure.
        """
        return 1 if phase.part == "head" else self.out_spec.num_leaves


@dataclass(frozen=True)
class Emission:
    """A site whose value is an output of a graph.

    Attributes:
        site: the site.
        anchor: the weight of the second half of the batch (usually the cond half) if the guidance halves are merged;
            None means that the value is emitted unchanged.
    """

    site: Site
    anchor: float | None = None

    @property
    def merged(self) -> bool:
        """Whether the guidance halves are merged, so that the batch is half the site's."""
        return self.anchor is not None

    @property
    def nbytes(self) -> int:
        """The size of the emitted value, in bytes."""
        return self.site.nbytes // (2 if self.merged else 1)


@dataclass(frozen=True)
class Variant:
    """The graph of one phase, for inputs of one shape.

    Its program takes flat tensors, `inputs` followed by the caches of `reused`, and returns a flat tuple: the
    denoiser's outputs, followed by the caches of `emitted`.

    Attributes:
        phase: the phase that it serves.
        program: the graph with its parameters, which are shared with the user's module.
        inputs: the names of its inputs without the caches. Unused inputs are left out.
        reused: the sites whose values are inputs, in order. A reused site is left out if everything that depends on it
            is reused as well.
        emitted: the sites whose values are outputs, in order.
    """

    phase: Phase
    program: ExportedProgram
    inputs: tuple[str, ...]
    reused: tuple[Site, ...]
    emitted: tuple[Emission, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The qualified names of the parameters, buffers and constants that the graph takes, in its order."""
        specs = self.program.graph_signature.input_specs
        return tuple(str(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT)


#: Operators that are made of others and have a result of their own, never one of their operands or a view of it.
_OWN_RESULT = frozenset(
    {
        torch.ops.aten.conv1d.default,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.conv3d.default,
        torch.ops.aten.group_norm.default,
        torch.ops.aten.layer_norm.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.matmul.default,
        torch.ops.aten.rms_norm.default,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.softmax.int,
    }
)


class _Nothing:
    """Takes the place of None in the structure of a denoiser's outputs: it has no leaves."""


pytree.register_pytree_node(
    _Nothing,
    lambda nothing: ([], None),
    lambda leaves, context: None,
    serialized_type_name="tgate_compile.Nothing",
    to_dumpable_context=lambda context: None,
    from_dumpable_context=lambda context: None,
)


def drop_none(program: ExportedProgram) -> None:
    """Remove the outputs of `program` that are None: a denoiser returns it for a modality that a call does not have.

    What is assembled from the remaining outputs, which are tensors, has None in these places again.
    """
    signature, output = program.graph_signature, program.graph.output_node()
    is_none = [isinstance(spec.arg, ConstantArgument) and spec.arg.value is None for spec in signature.output_specs]
    entry = program.module_call_graph[0].signature
    if not any(is_none) or entry is None or entry.out_spec.num_leaves != len(is_none):
        return
    places = [_Nothing() if none else place for place, none in enumerate(is_none)]
    entry.out_spec = pytree.tree_structure(pytree.tree_unflatten(places, entry.out_spec))
    signature.output_specs[:] = [spec for spec, none in zip(signature.output_specs, is_none, strict=True) if not none]
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    output.args = (tuple(value for value, none in zip(values, is_none, strict=True) if not none),)
    program.graph_module.recompile()


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return `program` without in-place operators, which may have no users and would be removed as dead code."""
    in_place = [node for node in program.graph.nodes if is_mutable(node)]
    if not in_place:
        return program
    if _write_to_own_tensors(program.graph, in_place):
        for node in in_place:
            _work_out_of_place(node)
        program.graph_module.recompile()
        return program
    # This traces the program again, which takes several times as long as the capture. An empty table decomposes nothing
    # else, so that the results stay bit-identical.
    result: ExportedProgram = program.run_decompositions({})
    return result


#: Views of a part of a tensor, each with the operator that returns the tensor with another value of that part.
_SCATTERING: Mapping[object, torch._ops.OpOverload] = {
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
}


def _write_to_own_tensors(graph: torch.fx.Graph, in_place: Sequence[Node]) -> bool:
    """Return whether each of the operators `in_place` writes to a result of the graph that has no other views yet."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    written: dict[Node, Node] = {}  # the node that made the tensor, for each operator that writes to all of it
    parts: set[Node] = set()  # views that are only written to
    for node in in_place:
        views, whole = _written_by(node)
        parts.update(views)
        tensor = written.get(whole, whole)
        names = [tensor, *(other for other, target in written.items() if target is tensor)]
        readers = {user for name in names for user in name.users if places[user] < places[node]}
        if not (
            _has_own_result(tensor)
            and not (views and node.users)
            and all(user in written or user in parts or _has_own_result(user) for user in readers)
            and _functional_target(node) is not None
        ):
            return False
        if not views:
            written[node] = tensor
    return True


def _written_by(node: Node) -> tuple[list[Node], Node]:
    """Return the views that `node` writes through, the last one first, and the tensor that they are views of."""
    views, whole = [], operand(node, 0)
    while whole.target in _SCATTERING and len(whole.users) == 1:
        views.append(whole)
        whole = operand(whole, 0)
    return views, whole


def _has_own_result(node: Node) -> bool:
    """Return whether the value of `node` certainly shares no memory with other values."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if any(result.alias_info is not None for result in target._schema.returns):
        return False
    # Operators with kernels of their own have to declare views; those that are made of others do not.
    return target in _OWN_RESULT or not target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def _functional_target(node: Node) -> torch._ops.OpOverload | None:
    """Return the operator that computes what the in-place `node` writes; None if there is none with equal results."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in target._schema.arguments]
    packet, _, name = str(target).removeprefix("aten.").partition(".")
    if writes.count(True) != 1 or not writes[0] or not packet.endswith("_") or target.namespace != "aten":
        return None
    found = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), name, None)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    value, before = _value_of(node, found), operand(node, 0).meta["val"]
    same = isinstance(value, torch.Tensor) and (value.dtype, value.shape) == (before.dtype, before.shape)
    return found if same else None  # the result of an operator may be of another type than what it is written to


def _value_of(node: Node, target: torch._ops.OpOverload) -> object:
    """Return the value of `target` on fake tensors, with the arguments of `node`."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with operand(node, 0).meta["val"].fake_mode:
        return target(*args, **kwargs)


def _work_out_of_place(node: Node) -> None:
    """Replace the in-place operator `node`, and let all that follows it read the new tensor instead of the old one."""
    target, (views, whole), later = _functional_target(node), _written_by(node), set(_after(node))
    assert target is not None
    new = _inserted(node, target, node.args, node.kwargs)
    for view in views:
        new = _inserted(node, _SCATTERING[view.target], (view.args[0], new, *view.args[1:]), view.kwargs)
    whole.replace_all_uses_with(new, delete_user_cb=lambda user: user in later)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    if not views:
        new.name = node.name  # the program's signature has the names of its outputs


def _inserted(before: Node, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> Node:
    """Insert a call of `target` before a node, as a part of the same module."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta = {**before.meta, "val": _value_of(node, target)}
    return node


def _after(node: Node) -> Iterator[Node]:
    nodes = iter(node.graph.nodes)
    for each in nodes:
        if each is node:
            break
    yield from nodes


def inline_disabled_autocast(graph_module: torch.fx.GraphModule) -> None:
    """Inline the regions of `graph_module` that switch autocast off, which it is when the denoiser runs.

    torch.export turns `with torch.amp.autocast("cuda", enabled=False)` into a call of a graph of its own.
    """
    graph = graph_module.graph
    nodes = graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast)
    regions = [node for node in nodes if not node.args[2]]
    for node in regions:
        region, *given = node.args[4:]
        body = getattr(graph_module, region.target).graph
        values = dict(zip((inner for inner in body.nodes if inner.op == "placeholder"), given, strict=True))
        with graph.inserting_before(node):
            for inner in body.nodes:
                if inner.op not in ("placeholder", "output"):
                    values[inner] = graph.node_copy(inner, values.__getitem__)
        results = next(inner.args[0] for inner in body.nodes if inner.op == "output")
        for user in list(node.users):  # torch.export gives the region a tuple of results
            user.replace_all_uses_with(values[results[user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)
    if regions:
        graph_module.recompile()
