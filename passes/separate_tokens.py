"""Separate the tokens of joint attention: compute those of the image apart from the others.

In the captured graph, operators work on sequences of text and image tokens. This pass moves the concatenation of the
two down, to the keys and values of each attention, where every token is needed. Token-wise operators act on either
part, the queries are split, and slices that pick one part disappear. The result computes the same values. Once the
text's keys and values are given, `remove_dead` then removes everything that only the text's tokens need.

These keys and values are sites of kind `cross`: they carry the text's influence on the image, as the outputs of
cross-attention are in other models.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.find_sites import Inputs, depends_on, innermost_call, unique_name, without_processor
from tgate_compile.passes.follow_rows import SPLITS, Size, placed, positive, rank, same_size, size_of, tensors_of
from tgate_compile.passes.graphs import Site, argument, copy_graph, operand, shape_of
from tgate_compile.passes.specialize import remove_dead, reuse
from tgate_compile.passes.token_rows import (
    JointAttention,
    Label,
    Tokens,
    is_plain_copy,
    is_size,
    joint_attentions,
    mixing_nodes,
    span_of_result,
    span_of_slice,
    text_left,
    token_rows,
)

aten = torch.ops.aten

#: The end of a slice that has no end.
_END = torch.iinfo(torch.int64).max

#: The position of the list of sizes in the arguments of operators that take the result's shape.
_TAKES_SIZES: Mapping[Any, int] = {
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.reshape.default: 1,
    aten.expand.default: 1,
}
_CATS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
_SLICES = {aten.slice.Tensor, aten.narrow.default}


MSG_NOT_SEPARATE = (
    "The text's tokens of {model} cannot be separated from the image's, so their keys and values cannot be cached: the "
    "two are combined outside of attention, or by an attention of an unknown form ({where}). What works instead: "
    "AdaptiveGuidance(step=...), which drops guidance after some steps, or fewer steps."
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
        sites: the keys and values of the text's tokens.
        whole: the graph with nodes for the sites, which its result does not depend on.
        separated: the graph with its tokens separated.
        pruned: the same, with the text's keys and values as inputs and without the text's tokens.
        live: the names of the inputs that the image's tokens come from.
    """

    sites: tuple[Site, ...]
    whole: torch.fx.GraphModule
    separated: torch.fx.GraphModule
    pruned: torch.fx.GraphModule
    live: tuple[str, ...]


def find_joint_attention(
    graph_module: torch.fx.GraphModule, inputs: Inputs, model: str, *, has_cross: bool
) -> Joint | None:
    """Return the joint attention of a captured denoiser; None if it has none. `graph_module` is not changed.

    A denoiser with cross-attention (`has_cross`) has joint attention only if the text's tokens see the image as well:
    otherwise keys that do not change were appended to a self-attention, as in GLIGEN.

    Raises:
        UnsupportedModelError: the text's tokens of the denoiser, called `model`, cannot be separated from the image's.
    """
    # Earlier frames and reference images are tokens of the image, too.
    live = [*inputs.latents, *(node for node in inputs.conditions if "latent" in node.name)]
    names = tuple(node.name for node in live)
    if not joint_attentions(graph_module.graph, token_rows(graph_module.graph, live)):
        return None
    whole = copy_graph(graph_module)
    labels = token_rows(whole.graph, [node for node in whole.graph.nodes if node.name in names])
    mixing = mixing_nodes(whole.graph, labels)
    sites, sources = mark_text(whole.graph, joint_attentions(whole.graph, labels), labels)
    whole.recompile()
    try:
        separated = separate_tokens(whole, names, sources)
    except GuardOnDataDependentSymNode as error:
        raise UnsupportedModelError(MSG_READS_LENGTHS.format(model=model)) from error
    if has_cross:
        nodes = {node.name: node for node in separated.graph.nodes}
        changing = depends_on(separated.graph, [nodes[node.name] for node in inputs.latents])
        if not any(nodes[site.node] in changing for site in sites):
            return None
    pruned = copy_graph(separated)
    reuse(pruned, sites)
    remove_dead(pruned)
    left = text_left(pruned.graph, [node for node in pruned.graph.nodes if node.name in names])
    if left:
        where = [f"{node.target} in {innermost_call(node)[1] or model}" for node in (mixing or left)[:3]]
        raise UnsupportedModelError(MSG_NOT_SEPARATE.format(model=model, where=", ".join(where)))
    return Joint(tuple(sites), whole, separated, pruned, names)


def mark_text(
    graph: torch.fx.Graph, attentions: Sequence[JointAttention], labels: dict[Node, Label]
) -> tuple[list[Site], dict[str, str]]:
    """Return the sites of the text's keys and values, and for each site's node the node of all keys or values.

    Where they are rows of a larger value, nodes that take these rows are added to `graph`. The result of the graph does
    not depend on them.
    """
    sites: list[Site] = []
    operands: dict[str, str] = {}
    names: list[str] = []
    for attention in attentions:
        path = unique_name(without_processor(innermost_call(attention.node)[1]), names)
        names.append(path)
        for what, node in (("key", attention.keys), ("value", attention.values)):
            text = _text_of(graph, node, labels)
            if text.name in operands:
                continue
            operands[text.name] = node.name
            fake = text.meta["val"]
            sites.append(
                Site("cross", f"{path}.{what}", text.name, tuple(fake.shape), fake.dtype, fake.dtype, of_text=True)
            )
    return sites, operands


def _text_of(graph: torch.fx.Graph, node: Node, labels: dict[Node, Label]) -> Node:
    """Return a node with the rows of `node` that are not live."""
    label = labels[node]
    if not isinstance(label, Tokens):
        return node
    if node.target in _CATS:
        texts = [tensor for tensor in tensors_of(node) if labels[tensor] is not True]
        if len(texts) == 1 and labels[texts[0]] is False:
            return texts[0]
    builder = _Builder(graph, labels, before=node.next, like=node)
    return builder.cut(node, label.dim, label, live=False)


def separate_tokens(
    graph_module: torch.fx.GraphModule, live: Sequence[str], text: Mapping[str, str]
) -> torch.fx.GraphModule:
    """Return a copy of `graph_module` in which the tokens are separated. It computes the same values.

    Args:
        graph_module: a captured denoiser, after `mark_text`.
        live: the names of the inputs that the image's tokens come from.
        text: the second result of `mark_text`. The nodes of the sites keep their names.
    """
    separated = copy_graph(graph_module)
    graph = separated.graph
    nodes = {node.name: node for node in graph.nodes}
    labels = token_rows(graph, [nodes[name] for name in live])
    separation = _Separation(graph, labels)
    for node in list(graph.nodes):
        if node.op == "call_function":
            separation.visit(node)
    for name, source in text.items():
        marked, rows = nodes[name], separation.rows(nodes[source], live=False)
        if rows is not marked:
            marked.replace_all_uses_with(rows)
            marked.name = f"{name}_unseparated"
            rows.name = name
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    separated.recompile()
    return separated


class _Builder:
    """Adds nodes to a graph, before the node `before` and with the origin of the node `like`."""

    def __init__(self, graph: torch.fx.Graph, labels: dict[Node, Label], before: Node, like: Node) -> None:
        self.graph = graph
        self.labels = labels
        self.before = before
        self.like = like
        self._cuts: dict[Any, Node] = {}
        self._symbols: dict[Any, Node] | None = None

    def call(self, target: Any, args: Any, kwargs: Any, live: Label) -> Node:
        """Add a call of `target`."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, tuple(args), dict(kwargs))
        node.meta = {key: value for key, value in self.like.meta.items() if key != "val"}
        node.meta["val"] = self._value(target, args, kwargs)
        self.labels[node] = live
        return node

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        fakes = map_arg((tuple(args), dict(kwargs)), lambda node: node.meta["val"])
        like = self.like.meta["val"]
        with (like[0] if isinstance(like, (list, tuple)) else like).fake_mode:
            return target(*fakes[0], **fakes[1])

    def cut(self, node: Node, dim: int, tokens: Tokens, *, live: bool) -> Node:
        """Return the rows of `node` along `dim` at the places of the live, or the other, rows of `tokens`."""
        key = node, dim, tokens.parts, live
        if key not in self._cuts:
            pieces = []
            offset: Size = 0
            for size, is_live in tokens.parts:
                if is_live is live:
                    pieces.append(self.slice(node, dim, offset, offset + size, live))
                offset = offset + size
            self._cuts[key] = self.cat(pieces, dim, live)
        return self._cuts[key]

    def slice(self, node: Node, dim: int, start: Size, stop: Size, live: bool) -> Node:
        """Return the rows of `node` from `start` to `stop` along `dim`; `node` itself if these are all."""
        total = size_of(shape_of(node)[dim])
        if same_size(start, 0) and same_size(stop, total):
            return node
        if node.target in _CATS and positive(argument(node, 1, "dim", 0), rank(node)) == dim:
            offset: Size = 0
            for tensor in tensors_of(node):
                size = size_of(shape_of(tensor)[dim])
                if same_size(offset, start) and same_size(offset + size, stop):
                    return tensor
                offset = offset + size
        written = self._slice_of_written(node, dim, start, stop, live)
        if written is not None:
            return written
        end = _END if same_size(stop, total) else self.amount(stop)
        return self.call(aten.slice.Tensor, (node, dim, self.amount(start), end), {}, live)

    def _slice_of_written(self, node: Node, dim: int, start: Size, stop: Size, live: bool) -> Node | None:
        """Return rows of a value that was made by assignments, as they are without those that do not concern them."""
        if node.target is aten.slice_scatter.default:
            span = span_of_slice(node, first=2)
            if span is None or span.dim != dim or not all(isinstance(each, int) for each in (start, stop, span.stop)):
                return None
            if stop <= span.start or span.stop <= start:
                return self.slice(operand(node, 0), dim, start, stop, live)
            if span.start <= start and stop <= span.stop:
                return self.slice(operand(node, 1), dim, start - span.start, stop - span.start, live)
        elif node.target is aten.select_scatter.default:
            row = positive(argument(node, 2, "dim"), rank(node))
            if row == dim:
                return None
            base = self.slice(operand(node, 0), dim, start, stop, live)
            source = self.slice(operand(node, 1), dim - (row < dim), start, stop, live)
            return self.call(node.target, (base, source, *node.args[2:]), node.kwargs, live)
        return None

    def cat(self, pieces: Sequence[Node], dim: int, live: Label) -> Node:
        """Return the concatenation of `pieces`; a single piece itself."""
        return pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, (list(pieces), dim), {}, live)

    def amount(self, size: Size) -> Any:
        """Return a size as an int, or as a node that computes it."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if self._symbols is None:
            self._symbols = self._sizes_of_inputs()
        return self._computed(size)

    def _sizes_of_inputs(self) -> dict[Any, Node]:
        """Return nodes for the free sizes of the inputs, by symbol, which are added after the inputs."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        found: dict[Any, Node] = {}
        with self.graph.inserting_after(inputs[-1]):
            for node in inputs:
                value = node.meta.get("val")
                for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                    symbol = size_of(size)
                    if not isinstance(symbol, int) and symbol.is_Symbol and symbol not in found:
                        made = self.graph.call_function(aten.sym_size.int, (node, dim))
                        made.meta["val"] = size
                        self.labels[made] = False
                        found[symbol] = made
        return found

    def _computed(self, size: Any) -> Any:
        assert self._symbols is not None
        if size.is_Integer:
            return int(size)
        if size in self._symbols:
            return self._symbols[size]
        target = operator.add if size.is_Add else operator.mul if size.is_Mul else None
        assert target is not None, f"a number of tokens is {size}"
        result = self._computed(size.args[0])
        for term in size.args[1:]:
            other = self._computed(term)
            with self.graph.inserting_before(self.before):
                made = self.graph.call_function(target, (result, other))
            made.meta["val"] = target(
                *(each.meta["val"] if isinstance(each, Node) else each for each in (result, other))
            )
            self.labels[made] = False
            result = made
        return result


class _Separation(_Builder):
    """Rewrites a graph node by node, in graph order."""

    def __init__(self, graph: torch.fx.Graph, labels: dict[Node, Label]) -> None:
        first = next(iter(graph.nodes))
        super().__init__(graph, labels, first, first)
        self._rows: dict[tuple[Node, bool], Node] = {}

    def rows(self, node: Node, *, live: bool) -> Node:
        """Return the live, or the other, rows of `node`."""
        return self._rows[node, live] if isinstance(self.labels[node], Tokens) else node

    def visit(self, node: Node) -> None:
        """Add the parts of the value of `node`, or compute it from the parts of its operands."""
        self.before, self.like = node.next, node
        label = self.labels[node]
        if is_plain_copy(node):
            node.replace_all_uses_with(operand(node, 1))
        elif node.target in FUSED:
            self._visit_attention(node, label)
        elif isinstance(label, Tokens):
            for live in (False, True):
                rows = self._part(node, label, live)
                if rows is not None:
                    self._rows[node, live] = rows
        elif node.target in _SLICES or node.target is operator.getitem:
            picked = self._picked(node, live=label)
            if picked is not None:
                node.replace_all_uses_with(picked)

    def _part(self, node: Node, label: Tokens, live: bool) -> Node | None:
        """Return the part of the value of `node`; None for a split along the tokens, whose results are visited."""
        if node.target in SPLITS:
            if positive(argument(node, 2, "dim", 0), rank(node)) == label.dim:
                return None
        elif node.target in _CATS and positive(argument(node, 1, "dim", 0), rank(node)) == label.dim:
            pieces = [self.rows(each, live=live) for each in tensors_of(node) if self.labels[each] is not (not live)]
            return self.cat(pieces, label.dim, live)
        elif node.target in _SLICES or node.target is operator.getitem:
            picked = self._picked(node, live=live)
            if picked is not None:
                return picked
        elif node.target is aten.slice_scatter.default:
            written = self._written(node, label, live)
            if written is not None:
                return written
        elif node.target is aten.pad_sequence.default:
            pieces = [self._of_sequence(each, live) for each in tensors_of(node)]
            return self._checked(self.call(node.target, (pieces, *node.args[1:]), node.kwargs, live), label, live)
        return self._applied(node, label, live)

    def _picked(self, node: Node, *, live: bool) -> Node | None:
        """Return the live, or the other, rows of a slice or split; None if it takes rows of all kinds."""
        is_slice = node.target in _SLICES
        span = span_of_slice(node) if is_slice else span_of_result(node)
        source = operand(node, 0) if is_slice or span is None else operand(operand(node, 0), 0)
        label = self.labels[source]
        if not isinstance(label, Tokens) or span is None or span.dim != label.dim:
            return None
        before, within = label.between(0, span.start), label.between(span.start, span.stop)
        if before is None or within is None:
            return None  # free sizes leave open which rows it takes
        start = sum(size for size, is_live in before if is_live is live)
        count = sum(size for size, is_live in within if is_live is live)
        return self.slice(self.rows(source, live=live), label.dim, start, start + count, live)

    def _written(self, node: Node, label: Tokens, live: bool) -> Node | None:
        """Return the part of a value some of whose rows were overwritten; None if another dimension was sliced."""
        base, source = operand(node, 0), operand(node, 1)
        span = span_of_slice(node, first=2)
        if span is None or span.dim != label.dim:
            return None
        pieces = [
            *self._between(base, span.dim, 0, span.start, live),
            *self._between(source, span.dim, 0, span.stop - span.start, live),
            *self._between(base, span.dim, span.stop, label.total, live),
        ]
        return self.cat(pieces, span.dim, live)

    def _between(self, node: Node, dim: int, start: Size, stop: Size, live: bool) -> list[Node]:
        """Return the live, or the other, rows of `node` between two places: one piece, or none if there are none."""
        label = self.labels[node]
        if not isinstance(label, Tokens):
            return [self.slice(node, dim, start, stop, live)] if label is live and not same_size(start, stop) else []
        before, within = label.between(0, start), label.between(start, stop)
        assert before is not None, "the label of an assignment is open"
        assert within is not None, "the label of an assignment is open"
        first = sum(size for size, is_live in before if is_live is live)
        count = sum(size for size, is_live in within if is_live is live)
        rows = self.rows(node, live=live)
        return [] if same_size(count, 0) else [self.slice(rows, dim, first, first + count, live)]

    def _of_sequence(self, node: Node, live: bool) -> Node:
        """Return the part of one of the sequences that are padded to one length."""
        if self.labels[node] is (not live):
            return self.call(aten.slice.Tensor, (node, 0, 0, 0), {}, live)
        return self.rows(node, live=live)

    def _applied(self, node: Node, label: Tokens, live: bool) -> Node:
        """Return the result of the operator of `node` on the parts of its operands."""

        def part(source: Node) -> Node:
            if is_size(source) or isinstance(self.labels[source], Tokens):
                return source if is_size(source) else self._rows[source, live]
            if not isinstance(source.meta.get("val"), torch.Tensor):
                return source
            for dim, size in enumerate(shape_of(source)):
                if same_size(size_of(size), label.total) and placed(node, source, dim) == label.dim:
                    return self.cut(source, dim, label, live=live)
            return source

        args: list[Any] = [map_arg(arg, part) for arg in node.args]
        kwargs = map_arg(node.kwargs, part)
        if node.target in _TAKES_SIZES:
            position = _TAKES_SIZES[node.target]
            sizes = list(args[position])
            if sizes[label.dim] != -1:
                sizes[label.dim] = self.amount(label.count(live))
            args[position] = sizes
        return self._checked(self.call(node.target, args, kwargs, live), label, live)

    def _checked(self, node: Node, label: Tokens, live: bool) -> Node:
        value = node.meta["val"]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            rows = size_of(each.shape[label.dim])
            assert same_size(rows, label.count(live)), f"{node.format_node()} has {rows} rows of {label}"
        return node

    def _visit_attention(self, node: Node, label: Label) -> None:
        query = operand(node, 0)
        if isinstance(self.labels[query], Tokens) and not isinstance(label, Tokens):
            return  # its queries cannot be split
        keys, values = (self._assembled(operand(node, position)) for position in (1, 2))
        if isinstance(label, Tokens):
            for live in (False, True):
                self._rows[node, live] = self._attended(node, self.rows(query, live=live), keys, values, label, live)
        elif (keys, values) != node.args[1:3]:
            node.replace_all_uses_with(self._attended(node, query, keys, values, None, label))

    def _assembled(self, node: Node) -> Node:
        """Return keys or values with their parts as operands of a concatenation, in their order."""
        label = self.labels[node]
        if not isinstance(label, Tokens) or label.dim != rank(node) - 2:
            return node
        key = node, "assembled"
        if key not in self._cuts:
            taken: dict[bool, Size] = {False: 0, True: 0}
            pieces = []
            for size, live in label.parts:
                start = taken[live]
                taken[live] = start + size
                pieces.append(self.slice(self.rows(node, live=live), label.dim, start, start + size, live))
            self._cuts[key] = self.cat(pieces, label.dim, label)
        return self._cuts[key]

    def _attended(self, node: Node, query: Node, keys: Node, values: Node, label: Tokens | None, live: bool) -> Node:
        """Return the attention `node` of other queries; `label` are the rows that they were taken from."""
        kwargs = dict(node.kwargs)
        args = [query, keys, values, *node.args[3:]]
        mask = argument(node, 3, "attn_mask")
        if isinstance(mask, Node) and label is not None:
            dim = rank(mask) - 2
            of_mask = self.labels[mask]
            if isinstance(of_mask, Tokens) and of_mask.dim == dim:
                mask = self.rows(mask, live=live)
            elif dim >= 0 and same_size(size_of(shape_of(mask)[dim]), label.total):
                mask = self.cut(mask, dim, label, live=live)
            if len(args) > 3:
                args[3] = mask
            else:
                kwargs["attn_mask"] = mask
        return self.call(node.target, args, kwargs, live)
