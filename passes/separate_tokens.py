"""Separate the tokens of joint attention: compute those of the image apart from the others.

In the captured graph, operators work on sequences of text and image tokens. This pass moves the concatenation of the
two down, to the keys and values of each attention, where every token is needed. Token-wise operators act on each part
separately, the queries are split, and slices that select one part disappear. The result computes the same values. Once
the text's keys and values are inputs, `remove_dead` removes everything that only the text's tokens need.

These keys and values are sites of kind `cross`: they carry the text's influence on the image, as the outputs of
cross-attention do in other models. The tokens of reference images can be separated in the same way, as sites of kind
`reference`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.methods.method import CROSS, Kind
from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.find_sites import (
    Inputs,
    depends_on,
    innermost_call,
    unique_name,
    value_inputs,
    without_processor,
)
from tgate_compile.passes.follow_rows import SPLITS, placed, positive, rank, same_size, size_of, tensors_of
from tgate_compile.passes.graphs import Origins, Site, add_call, argument, copy_graph, operand, outputs_of
from tgate_compile.passes.specialize import KINDS_OF_STREAMS, remove_dead, reuse
from tgate_compile.passes.token_rows import (
    Labels,
    Stream,
    Tokens,
    is_size,
    joint_attentions,
    label_of_operand,
    mixing_nodes,
    streams_of,
    token_rows,
    tokens_left,
)
from tgate_compile.passes.token_streams import CATS, Builder, Known, Separation

aten = torch.ops.aten

MSG_NOT_SEPARATE = (
    "The text's tokens of {model} cannot be separated from the image's, so their keys and values cannot be cached: the "
    "two are combined outside of attention, or by an attention of an unknown form ({where}). What works instead: "
    "AdaptiveGuidance(step=...), which drops guidance after some steps, or fewer steps."
)
MSG_NO_HIDDEN = (
    "The text's hidden states in {model} were not found: the keys or values of {where} are not computed from a single "
    'sequence of the text. Cache its keys and values instead: FrozenText(..., text="keys").'
)
MSG_READS_LENGTHS = (
    "The number of the text's tokens in {model} depends on the values of a mask, so a graph with fixed sizes cannot "
    "hold their keys and values. What works instead: AdaptiveGuidance(step=...), which drops guidance after some "
    "steps, or fewer steps."
)


@dataclass(frozen=True)
class Joint:
    """The joint attention of a captured denoiser.

    Attributes:
        sites: the keys and values of the tokens that can be frozen.
        whole: the graph with nodes for the sites, which its result does not depend on.
        separated: the graph with its tokens separated.
        pruned: the same, with the keys and values of these tokens as inputs, and without the tokens.
        origins: the inputs that the tokens come from.
        constant: whether none of the sites depends on the latents or the timestep.
    """

    sites: tuple[Site, ...]
    whole: torch.fx.GraphModule
    separated: torch.fx.GraphModule
    pruned: torch.fx.GraphModule
    origins: Origins
    constant: bool


def find_joint_attention(
    graph_module: torch.fx.GraphModule,
    inputs: Inputs,
    model: str,
    kinds: Collection[Kind] = CROSS,
    *,
    has_cross: bool,
    only_constant: bool = False,
    hidden: bool = False,
    image: tuple[int, int, int] | None = None,
    known: Known = lambda node: None,
) -> Joint | None:
    """Return the joint attention of a captured denoiser; None if it has none. `graph_module` is not changed.

    A denoiser with cross-attention (`has_cross`) has joint attention only if the text's tokens attend to the image as
    well: otherwise, keys that do not change were appended to a self-attention, as in GLIGEN.

    Args:
        graph_module: the captured denoiser.
        inputs: its inputs.
        model: its name in messages.
        kinds: the kinds of sites to find: `cross` for the text's keys and values, `reference` for those of reference
            images.
        has_cross: whether it has cross-attention.
        only_constant: whether to return None unless the keys and values are the same in all steps.
        hidden: whether the text's sites are its hidden states before each attention, instead of its keys and values.
        image: the rows of the latents that belong to the image, if others belong to reference images (`Origins`).
        known: returns the values of masks, which may show that tokens do not attend to others.

    Raises:
        UnsupportedModelError: the tokens cannot be separated from the image's, or their hidden states were not found.
    """
    # Earlier frames and images in separate inputs are also tokens of the image.
    latents = [*inputs.latents, *(node for node in inputs.conditions if "latent" in node.name)]
    conditions = [node for node in inputs.conditions if node not in latents]
    names = (tuple(node.name for node in nodes) for nodes in (latents, inputs.times, conditions))
    origins = Origins(next(names), next(names), next(names), image)
    streams = [stream for stream, kind in KINDS_OF_STREAMS.items() if kind in kinds]
    rows = token_rows(graph_module.graph, origins)
    if not joint_attentions(graph_module.graph, rows, streams):
        return None
    if only_constant and not may_be_constant(graph_module.graph, rows, streams, known):
        return None
    whole = copy_graph(graph_module)
    labels = token_rows(whole.graph, origins)
    mixing = mixing_nodes(whole.graph, labels)
    states: Mapping[Node, Sequence[Node]] = {}
    if hidden:
        roots = [node.name for node in (*latents, *conditions) if _is_sequence(node)]
        states = hidden_states(whole.graph, labels, roots, model)
    sites, sources = mark_tokens(whole.graph, labels, streams, states)
    whole.recompile()
    try:
        separated = separate_tokens(whole, origins, sources, known)
    except GuardOnDataDependentSymNode as error:
        if only_constant:
            return None
        raise UnsupportedModelError(MSG_READS_LENGTHS.format(model=model)) from error
    if has_cross and not _changing(separated.graph, sites, inputs.latents):
        return None
    changing_inputs = (*inputs.latents, *inputs.times)
    constant = not _changing(separated.graph, sites, changing_inputs)
    if only_constant and not constant:
        return None
    if constant and _changing(whole.graph, sites, changing_inputs):
        whole = separated  # computes them separately, so that they need not be computed in every step
    pruned = copy_graph(separated)
    reuse(pruned, sites)
    remove_dead(pruned)
    left = tokens_left(pruned.graph, origins, streams)
    if left and only_constant:
        return None
    if left:
        where = [f"{node.target} in {innermost_call(node)[1] or model}" for node in (mixing or left)[:3]]
        raise UnsupportedModelError(MSG_NOT_SEPARATE.format(model=model, where=", ".join(where)))
    return Joint(tuple(sites), whole, separated, pruned, origins, constant)


def _changing(graph: torch.fx.Graph, sites: Iterable[Site], inputs: Iterable[Node]) -> bool:
    """Return whether the value at one of `sites` depends on one of `inputs`, given as nodes of any copy of `graph`."""
    nodes = {node.name: node for node in graph.nodes}
    changing = depends_on(graph, [nodes[node.name] for node in inputs if node.name in nodes])
    return any(nodes[site.node] in changing for site in sites)


def may_be_constant(graph: torch.fx.Graph, labels: Labels, streams: Collection[Stream], known: Known) -> bool:
    """Return whether the tokens of `streams` may be the same in all steps: whether none of them attends to the image.

    This is a quick test on a graph whose tokens are not separated. An attention with a known mask may hide the image.
    """
    for node in graph.nodes:
        if node.target not in FUSED:
            continue
        query, keys = (streams_of(labels[operand(node, position)]) for position in (0, 1))
        mask = argument(node, 3, "attn_mask")
        sees = Stream.IMAGE in keys and any(stream in query for stream in streams)
        if sees and not (isinstance(mask, Node) and known(mask) is not None):
            return False
    return True


#: The value of all elements that operators make like another value; None if it is their second argument.
_FILLED: Mapping[object, int | None] = {
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
}


def without_likes(graph: torch.fx.Graph) -> None:
    """Replace casts to the dtype of another value, and constants in its shape, with operators that do not take it."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        with graph.inserting_before(node):
            if node.target is aten.type_as.default:
                plain = add_call(graph, aten.to.dtype, operand(node, 0), value.dtype)
            elif node.target in _FILLED and all(type(size) is int for size in value.shape):
                fill = _FILLED[node.target] if _FILLED[node.target] is not None else node.args[1]
                options = {"dtype": value.dtype, "device": value.device}
                plain = graph.call_function(aten.full.default, (list(value.shape), fill), options)
                plain.meta["val"] = value
            else:
                continue
        plain.meta = {**node.meta, "val": plain.meta["val"]}
        node.replace_all_uses_with(plain)
        plain.name, node.name = node.name, f"{node.name}_like"


def split_times(graph: torch.fx.Graph, times: Sequence[str], known: Known) -> None:
    """Separate the rows of a batch that belong to the present timestep from rows that belong to a fixed timestep.

    Some models modulate the text with a timestep of zero, which is a row of the same batch.
    """
    labels = token_rows(graph, Origins(latents=tuple(times)))
    if any(isinstance(label, Tokens) and label.dim != 0 for label in labels.values()):
        return  # the timestep is a token
    separation = Separation(graph, labels, known)
    for node in list(graph.nodes):
        if node.op == "call_function":
            separation.visit(node)
    separation.visit_outputs()


#: The nodes of all rows that a site's rows are taken from, and the stream of the site, by the name of its node.
Sources = Mapping[str, tuple[str, Stream]]


def mark_tokens(
    graph: torch.fx.Graph, labels: Labels, streams: Sequence[Stream], hidden: Mapping[Node, Sequence[Node]]
) -> tuple[list[Site], Sources]:
    """Return the sites of the keys and values of the tokens of `streams`, and the sources of their nodes.

    Where `hidden` has hidden states for an attention, these are the text's sites instead of its keys and values. The
    rows of these tokens in the outputs of the graph are sites as well. Where the rows are part of a larger value, nodes
    that take them are added to `graph`. The outputs of the graph do not depend on these nodes.
    """
    sites: list[Site] = []
    sources: dict[str, tuple[str, Stream]] = {}
    names: list[str] = []
    rows: list[tuple[str, Node, Sequence[Stream]]] = []
    for attention in joint_attentions(graph, labels, streams):
        path = unique_name(without_processor(innermost_call(attention.node)[1]), names)
        names.append(path)
        states = hidden.get(attention.node, ())
        rows += [(f"{path}.hidden{i or ''}", node, (Stream.TEXT,)) for i, node in enumerate(states)]
        others = [stream for stream in streams if not states or stream is not Stream.TEXT]
        rows += [(f"{path}.key", attention.keys, others), (f"{path}.value", attention.values, others)]
    for i, node in enumerate(outputs_of(graph)):
        if isinstance(labels[node], Tokens):
            rows.append((f"output.{i}", node, streams))
    for name, node, sought in rows:
        label = labels[node]
        for stream in sought:
            if stream not in streams_of(label):
                continue
            taken = _rows_of(graph, node, labels, stream)
            if taken.name in sources:
                continue
            sources[taken.name] = node.name, stream
            fake, kind = taken.meta["val"], KINDS_OF_STREAMS[stream]
            sites.append(Site(kind, name, taken.name, tuple(fake.shape), fake.dtype, fake.dtype, of_text=True))
    return sites, sources


def _is_sequence(node: Node) -> bool:
    """Return whether an input may have a row of features for each token: positions and masks have none."""
    value = node.meta.get("val")
    is_possible = torch.is_tensor(value) and value.is_floating_point() and value.ndim >= 3
    return is_possible and not _is_beside_features(node)


def _is_beside_features(node: Node) -> bool:
    """Return whether an input gets to an attention without a projection, as positions and masks do."""
    found, queue = {node}, [node]
    while queue:
        source = queue.pop()
        for user in source.users:
            if user.target in FUSED:
                return True
            is_projected = user.target in _PROJECTIONS and operand(user, 0) is source
            if user not in found and not is_projected and not is_size(user):
                found.add(user)
                queue.append(user)
    return False


_SLICES = {aten.slice.Tensor, aten.narrow.default}
#: Operators that project each row of their first operand, if the second one holds weights.
_PROJECTIONS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
_SUMS = {aten.add.Tensor, aten.add_.Tensor}
#: Assignments to some rows of their first operand.
_SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}
#: Operators whose results are hidden states if no block comes before.
_BEGINNINGS = {*FUSED, *_PROJECTIONS, aten.pad_sequence.default}


def hidden_states(
    graph: torch.fx.Graph, labels: Labels, roots: Collection[str], model: str
) -> dict[Node, tuple[Node, ...]]:
    """Return the values between blocks that the text's keys and values are computed from, for each joint attention.

    From a hidden state, a block computes keys and values by normalization, modulation with the timestep and linear
    layers. It is the nearest value, before a linear layer, that all rows of the keys depend on and that is a sum of two
    sequences (the input of a block and what the block adds to it), or where there is no block before, a sequence
    assembled from several of the text, the result of another linear layer, or an input. Keys and values usually have
    the same hidden state.

    Args:
        graph: the graph of a denoiser.
        labels: the labels of its values.
        roots: the names of the inputs with sequences, of latents or of a text.
        model: the denoiser's name in messages.

    Raises:
        UnsupportedModelError: the keys or values of an attention are not computed from one value.
    """
    content = depends_on(graph, [node for node in graph.nodes if node.name in roots])
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[Node, tuple[Node, ...]] = {}
    for attention in joint_attentions(graph, labels, [Stream.TEXT]):
        states = [_state_before(operand(attention.node, i), labels, content, order) for i in (1, 2)]
        if any(state is None or Stream.TEXT not in streams_of(labels[state]) for state in states):
            raise UnsupportedModelError(
                MSG_NO_HIDDEN.format(model=model, where=innermost_call(attention.node)[1] or attention.node.name)
            )
        found[attention.node] = tuple(dict.fromkeys(state for state in states if state is not None))
    return found


def _state_before(start: Node, labels: Labels, content: Collection[Node], order: Mapping[Node, int]) -> Node | None:
    """Return the hidden state that the keys or values `start` are computed from; None if there is not exactly one."""
    dims = {start: rank(start) - 2}
    queue = [(-order[start], start)]
    is_projected = False
    while queue:
        node = heapq.heappop(queue)[1]
        sources = dict(_rows_before(node, dims[node], labels, content))
        is_sum = node.target in _SUMS and len(sources) > 1
        is_assembled = len(sources) > 1 and (node.target in _SCATTERS or _joins_tokens(node, dims[node]))
        is_end = node.op == "placeholder" or node.target in _BEGINNINGS or is_assembled
        if is_projected and not queue and (is_sum or is_end):
            return node  # all paths lead through it, as there is none beside it
        if not sources:
            return None
        is_projected = is_projected or node.target in _PROJECTIONS
        for source, dim in sources.items():
            if source not in dims:
                dims[source] = dim
                heapq.heappush(queue, (-order[source], source))
    return None


def _rows_before(node: Node, dim: int, labels: Labels, content: Collection[Node]) -> Iterator[tuple[Node, int]]:
    """Yield the operands of `node` that have the rows of the text's tokens along `dim`, with their dimension of these.

    Other operands, such as weights, modulation and tables of positions, are left out.
    """
    if node.target is aten.slice_scatter.default or _joins_tokens(node, dim):
        tensors = tensors_of(node) if node.target in CATS else [operand(node, 0), operand(node, 1)]
        for each in tensors:
            if each in content and Stream.TEXT in streams_of(label_of_operand(each, tensors, labels)):
                yield each, dim
        return
    for source in value_inputs(node):
        if source not in content or is_size(source):
            continue
        if node.target in SPLITS or node.target in _SLICES:
            yield source, dim  # all of the rows, or some of them
            continue
        for at in range(rank(source)):
            same = placed(node, source, at) == dim
            if same and same_size(size_of(_shape(source)[at]), size_of(_shape(node)[dim])):
                yield source, at
                break


def _joins_tokens(node: Node, dim: int) -> bool:
    """Return whether `node` is a concatenation along `dim`."""
    return node.target in CATS and positive(argument(node, 1, "dim", 0), rank(node)) == dim


def _shape(node: Node) -> torch.Size:
    """Return the shape of the value of `node`, or of the first if it has several."""
    value = node.meta["val"]
    shape: torch.Size = (value[0] if isinstance(value, (list, tuple)) else value).shape
    return shape


def _rows_of(graph: torch.fx.Graph, node: Node, labels: Labels, stream: Stream) -> Node:
    """Return a node with the rows of `node` that belong to `stream`."""
    label = labels[node]
    if not isinstance(label, Tokens):
        return node
    if node.target in CATS:
        tensors = tensors_of(node)
        found = [each for each in tensors if stream in streams_of(label_of_operand(each, tensors, labels))]
        if len(found) == 1 and labels[found[0]] is stream:
            return found[0]
    builder = Builder(graph, labels, before=node.next, like=node)
    return builder.cut(node, label.dim, label, stream)


def separate_tokens(
    graph_module: torch.fx.GraphModule, origins: Origins, sources: Sources, known: Known = lambda node: None
) -> torch.fx.GraphModule:
    """Return a copy of `graph_module` in which the tokens are separated. It computes the same values.

    Args:
        graph_module: a captured denoiser, after `mark_tokens`.
        origins: the inputs that the tokens come from.
        sources: the second result of `mark_tokens`. The nodes of the sites keep their names.
        known: returns the values of masks in `graph_module`. Attention leaves out tokens that a mask hides from all
            tokens of a stream.
    """
    separated = copy_graph(graph_module)
    graph = separated.graph
    without_likes(graph)
    split_times(graph, origins.times, known)
    nodes = {node.name: node for node in graph.nodes}
    labels = token_rows(graph, origins)
    separation = Separation(graph, labels, known)
    separation.visit_inputs()
    for node in list(graph.nodes):
        if node.op == "call_function":
            separation.visit(node)
    separation.visit_outputs()
    for name, (source, stream) in sources.items():
        marked, rows = nodes[name], separation.rows(nodes[source], stream)
        if rows is not marked:
            marked.replace_all_uses_with(rows)
            marked.name = f"{name}_unseparated"
            rows.name = name
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    separated.recompile()
    return separated
