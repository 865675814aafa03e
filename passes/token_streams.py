"""Build graphs with separated tokens: the rows of every stream of each value, computed apart from the others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.follow_rows import SPLITS, Size, placed, positive, rank, same_size, size_of, tensors_of
from tgate_compile.passes.graphs import argument, operand, outputs_of, shape_of
from tgate_compile.passes.token_rows import (
    Label,
    Labels,
    Stream,
    Tokens,
    is_plain_copy,
    is_size,
    label_of_operand,
    padding_of,
    span_of_result,
    span_of_slice,
    streams_of,
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
CATS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
_SLICES = {aten.slice.Tensor, aten.narrow.default}
_PADS = {aten.constant_pad_nd.default, aten.pad.default}

#: Returns the value of a node that depends only on constants and on inputs with known values; otherwise None.
Known = Callable[[Node], torch.Tensor | None]


class Builder:
    """Adds nodes to a graph, before the node `before` and with the origin of the node `like`."""

    def __init__(
        self, graph: torch.fx.Graph, labels: Labels, before: Node, like: Node, known: Known = lambda node: None
    ) -> None:
        self.graph = graph
        self.labels = labels
        self.known = known
        self.before = before
        self.like = like
        self._cuts: dict[Any, Node] = {}
        self._choices: dict[Node, bool] = {}
        self._symbols: dict[Any, Node] | None = None

    def call(self, target: Any, args: Any, kwargs: Any, label: Label) -> Node:
        """Add a call of `target`."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, tuple(args), dict(kwargs))
        node.meta = {key: value for key, value in self.like.meta.items() if key != "val"}
        node.meta["val"] = self._value(target, args, kwargs)
        self.labels[node] = label
        return node

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        fakes = map_arg((tuple(args), dict(kwargs)), lambda node: node.meta["val"])
        like = self.like.meta["val"]
        with (like[0] if isinstance(like, (list, tuple)) else like).fake_mode:
            return target(*fakes[0], **fakes[1])

    def cut(self, node: Node, dim: int, tokens: Tokens, stream: Stream) -> Node:
        """Return the rows of `node` along `dim` at the places of the rows of `stream` in `tokens`."""
        key = node, dim, tokens.parts, stream
        if key not in self._cuts:
            pieces = []
            offset: Size = 0
            for size, of in tokens.parts:
                if of is stream:
                    pieces.append(self.slice(node, dim, offset, offset + size, stream))
                offset = offset + size
            self._cuts[key] = self.cat(pieces, dim, stream)
        return self._cuts[key]

    def slice(self, node: Node, dim: int, start: Size, stop: Size, label: Label) -> Node:
        """Return the rows of `node` from `start` to `stop` along `dim`; `node` itself if these are all."""
        total = size_of(shape_of(node)[dim])
        if same_size(start, 0) and same_size(stop, total):
            return node
        if node.target in CATS and positive(argument(node, 1, "dim", 0), rank(node)) == dim:
            offset: Size = 0
            for tensor in tensors_of(node):
                size = size_of(shape_of(tensor)[dim])
                if same_size(offset, start) and same_size(offset + size, stop):
                    return tensor
                offset = offset + size
        found = self._slice_of_written(node, dim, start, stop, label)
        if found is None and self._has_choice(node):
            found = self._slice_of_chosen(node, dim, start, stop, label)
        if found is not None:
            return found
        end = _END if same_size(stop, total) else self.amount(stop)
        return self.call(aten.slice.Tensor, (node, dim, self.amount(start), end), {}, label)

    def _slice_of_written(self, node: Node, dim: int, start: Size, stop: Size, label: Label) -> Node | None:
        """Return rows of a value that was built by assignments, without the assignments to other rows."""
        if node.target is aten.slice_scatter.default:
            span = span_of_slice(node, first=2)
            if span is None or span.dim != dim or not all(isinstance(each, int) for each in (start, stop, span.stop)):
                return None
            if stop <= span.start or span.stop <= start:
                return self.slice(operand(node, 0), dim, start, stop, label)
            if span.start <= start and stop <= span.stop:
                return self.slice(operand(node, 1), dim, start - span.start, stop - span.start, label)
        elif node.target is aten.select_scatter.default:
            row = positive(argument(node, 2, "dim"), rank(node))
            if row == dim:
                return None
            base = self.slice(operand(node, 0), dim, start, stop, label)
            source = self.slice(operand(node, 1), dim - (row < dim), start, stop, label)
            return self.call(node.target, (base, source, *node.args[2:]), node.kwargs, label)
        return None

    def _has_choice(self, node: Node) -> bool:
        """Return whether `node` is computed, token by token, from a choice between two values."""
        if node not in self._choices:
            is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
            is_choice = node.target is aten.where.self and self.known(operand(node, 0)) is not None
            self._choices[node] = is_choice or (is_pointwise and any(map(self._has_choice, node.all_input_nodes)))
        return self._choices[node]

    def _slice_of_chosen(self, node: Node, dim: int, start: Size, stop: Size, label: Label) -> Node | None:
        """Return rows of a value, computed only from the operands chosen for them; None if the choice is not known."""
        shape = shape_of(node)
        total, ndim = shape[dim], rank(node)
        if not all(type(size) is int for size in (start, stop, *shape)):
            return None

        def rows_of(source: Node) -> Node:
            own = dim - ndim + rank(source) if torch.is_tensor(source.meta.get("val")) else -1
            if own < 0 or shape_of(source)[own] != total:
                return source  # the same for all rows
            return self.slice(source, own, start, stop, label)

        if node.target is aten.where.self:
            condition, *choices = (operand(node, position) for position in range(3))
            own = dim - ndim + rank(condition)
            value = self.known(condition)
            if value is None or own < 0 or value.shape[own] != total:
                return None
            flags = value.narrow(own, start, stop - start)
            if bool(flags.any()) != bool(flags.all()):
                return None
            chosen = choices[0 if bool(flags.all()) else 1]
            if chosen.meta["val"].dtype != node.meta["val"].dtype:
                return None
            sizes = [stop - start if i == dim else size for i, size in enumerate(shape)]
            return self.call(aten.expand.default, (rows_of(chosen), sizes), {}, label)
        return self.call(node.target, map_arg(node.args, rows_of), map_arg(node.kwargs, rows_of), label)

    def cat(self, pieces: Sequence[Node], dim: int, label: Label) -> Node:
        """Return the concatenation of `pieces`; a single piece itself."""
        return pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, (list(pieces), dim), {}, label)

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
                        self.labels[made] = Stream.TEXT
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
            self.labels[made] = Stream.TEXT
            result = made
        return result


class Separation(Builder):
    """Rewrites a graph node by node, in graph order."""

    def __init__(self, graph: torch.fx.Graph, labels: Labels, known: Known) -> None:
        first = next(iter(graph.nodes))
        super().__init__(graph, labels, first, first, known)
        self._rows: dict[tuple[Node, Stream], Node] = {}

    def rows(self, node: Node, stream: Stream) -> Node:
        """Return the rows of `node` that belong to `stream`."""
        return self._rows[node, stream] if isinstance(self.labels[node], Tokens) else node

    def visit(self, node: Node) -> None:
        """Add the parts of the value of `node`, or compute it from the parts of its operands."""
        self.before, self.like = node.next, node
        label = self.labels[node]
        if is_plain_copy(node):
            node.replace_all_uses_with(operand(node, 1))
        elif node.target in FUSED:
            self._visit_attention(node, label)
        elif isinstance(label, Tokens):
            for stream in label.streams:
                rows = self._part(node, label, stream)
                if rows is not None:
                    self._rows[node, stream] = rows
        elif node.target in _SLICES or node.target is operator.getitem:
            picked = self._picked(node, label)
            if picked is not None:
                node.replace_all_uses_with(picked)

    def _part(self, node: Node, label: Tokens, stream: Stream) -> Node | None:
        """Return the part of the value of `node`; None for a split along the tokens, whose results have parts."""
        if node.target in SPLITS:
            if positive(argument(node, 2, "dim", 0), rank(node)) == label.dim:
                return None
        elif node.target in CATS and positive(argument(node, 1, "dim", 0), rank(node)) == label.dim:
            tensors = tensors_of(node)
            pieces = [
                self.rows(each, stream)
                for each in tensors
                if stream in streams_of(label_of_operand(each, tensors, self.labels))
            ]
            return self.cat(pieces, label.dim, stream)
        elif node.target in _SLICES or node.target is operator.getitem:
            picked = self._picked(node, stream)
            if picked is not None:
                return picked
        elif node.target is aten.slice_scatter.default:
            written = self._written(node, label, stream)
            if written is not None:
                return written
        elif node.target is aten.pad_sequence.default:
            pieces = [self._of_sequence(each, stream) for each in tensors_of(node)]
            return self._checked(self.call(node.target, (pieces, *node.args[1:]), node.kwargs, stream), label, stream)
        elif node.target in _PADS and (pads := padding_of(node)) is not None and pads[0] == label.dim:
            rows = self.rows(operand(node, 0), stream)
            if stream is not Stream.TEXT:
                return rows
            return self._checked(self.call(node.target, (rows, *node.args[1:]), node.kwargs, stream), label, stream)
        return self._applied(node, label, stream)

    def _picked(self, node: Node, label: Label) -> Node | None:
        """Return the rows of one stream of a slice or split; None if it takes rows that are not known."""
        is_slice = node.target in _SLICES
        span = span_of_slice(node) if is_slice else span_of_result(node)
        source = operand(node, 0) if is_slice or span is None else operand(operand(node, 0), 0)
        tokens = self.labels[source]
        if not isinstance(label, Stream) or not isinstance(tokens, Tokens) or span is None or span.dim != tokens.dim:
            return None
        before, within = tokens.between(0, span.start), tokens.between(span.start, span.stop)
        if before is None or within is None:
            return None  # with free sizes, it is not known which rows it takes
        start = sum(size for size, of in before if of is label)
        count = sum(size for size, of in within if of is label)
        return self.slice(self.rows(source, label), tokens.dim, start, start + count, label)

    def _written(self, node: Node, label: Tokens, stream: Stream) -> Node | None:
        """Return the part of a value some of whose rows were overwritten; None if another dimension was sliced."""
        base, source = operand(node, 0), operand(node, 1)
        span = span_of_slice(node, first=2)
        if span is None or span.dim != label.dim:
            return None
        pieces = [
            *self._between(base, span.dim, 0, span.start, stream),
            *self._between(source, span.dim, 0, span.stop - span.start, stream),
            *self._between(base, span.dim, span.stop, label.total, stream),
        ]
        return self.cat(pieces, span.dim, stream)

    def _between(self, node: Node, dim: int, start: Size, stop: Size, stream: Stream) -> list[Node]:
        """Return the rows of `stream` of `node` between two places: one piece, or none if there are none."""
        label = self.labels[node]
        if not isinstance(label, Tokens):
            is_any = label is stream and not same_size(start, stop)
            return [self.slice(node, dim, start, stop, stream)] if is_any else []
        before, within = label.between(0, start), label.between(start, stop)
        assert before is not None, "the label of an assignment is open"
        assert within is not None, "the label of an assignment is open"
        first = sum(size for size, of in before if of is stream)
        count = sum(size for size, of in within if of is stream)
        return [] if same_size(count, 0) else [self.slice(self.rows(node, stream), dim, first, first + count, stream)]

    def _of_sequence(self, node: Node, stream: Stream) -> Node:
        """Return the part of one of the sequences that are padded to one length."""
        if stream not in streams_of(self.labels[node]):
            return self.call(aten.slice.Tensor, (node, 0, 0, 0), {}, stream)
        return self.rows(node, stream)

    def _applied(self, node: Node, label: Tokens, stream: Stream) -> Node:
        """Return the result of the operator of `node` on the parts of its operands."""

        def part(source: Node) -> Node:
            if is_size(source) or isinstance(self.labels[source], Tokens):
                return source if is_size(source) else self._rows[source, stream]
            if not isinstance(source.meta.get("val"), torch.Tensor):
                return source
            for dim, size in enumerate(shape_of(source)):
                if same_size(size_of(size), label.total) and placed(node, source, dim) == label.dim:
                    return self.cut(source, dim, label, stream)
            return source

        args: list[Any] = [map_arg(arg, part) for arg in node.args]
        kwargs = map_arg(node.kwargs, part)
        if node.target in _TAKES_SIZES:
            position = _TAKES_SIZES[node.target]
            sizes = list(args[position])
            if sizes[label.dim] != -1:
                sizes[label.dim] = self.amount(label.count(stream))
            args[position] = sizes
        return self._checked(self.call(node.target, args, kwargs, stream), label, stream)

    def _checked(self, node: Node, label: Tokens, stream: Stream) -> Node:
        value = node.meta["val"]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            rows = size_of(each.shape[label.dim])
            assert same_size(rows, label.count(stream)), f"{node.format_node()} has {rows} rows of {label}"
        return node

    def visit_inputs(self) -> None:
        """Add the parts of inputs."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.before = inputs[-1].next
        for node in inputs:
            label = self.labels[node]
            if isinstance(label, Tokens):
                self.like = node
                for stream in label.streams:
                    self._rows[node, stream] = self.cut(node, label.dim, label, stream)

    def visit_outputs(self) -> None:
        """Compute what the graph returns from its parts."""
        output = self.graph.output_node()
        self.before = output
        for node in outputs_of(self.graph):
            label = self.labels[node]
            if isinstance(label, Tokens):
                self.like = node
                output.replace_input_with(node, self._assembled(node, label))

    def _visit_attention(self, node: Node, label: Label) -> None:
        query = operand(node, 0)
        if isinstance(self.labels[query], Tokens) and not isinstance(label, Tokens):
            return  # its queries cannot be split
        if isinstance(label, Tokens):
            for stream in label.streams:
                self._rows[node, stream] = self._attended(node, self.rows(query, stream), label, stream)
        elif any(self._is_apart(operand(node, position)) for position in (1, 2)):
            node.replace_all_uses_with(self._attended(node, query, None, label))

    def _is_apart(self, node: Node) -> bool:
        """Return whether the keys or values `node` are made of separate parts."""
        label = self.labels[node]
        return isinstance(label, Tokens) and label.dim == rank(node) - 2

    def _assembled(self, node: Node, label: Tokens, hidden: Collection[int] = ()) -> Node:
        """Return a value with its parts as operands of a concatenation, in their order, without those in `hidden`."""
        key = node, "assembled", tuple(hidden)
        if key not in self._cuts:
            taken: dict[Stream, Size] = dict.fromkeys(label.streams, 0)
            pieces = []
            for i, (size, stream) in enumerate(label.parts):
                start = taken[stream]
                taken[stream] = start + size
                if i not in hidden:
                    pieces.append(self.slice(self.rows(node, stream), label.dim, start, start + size, stream))
            self._cuts[key] = self.cat(pieces, label.dim, label)
        return self._cuts[key]

    def _attended(self, node: Node, query: Node, label: Tokens | None, stream: Label) -> Node:
        """Return the attention `node` for other queries: the rows of `stream` in `label`."""
        keys, values = operand(node, 1), operand(node, 2)
        mask: Any = argument(node, 3, "attn_mask")
        of_keys = self.labels[keys]
        hidden: tuple[int, ...] = ()
        if isinstance(mask, Node) and label is not None and isinstance(stream, Stream):
            mask, hidden = self._mask_of(mask, of_keys if self._is_apart(keys) else None, label, stream)
        parts = [
            self._assembled(each, of_each, hidden) if isinstance(of_each, Tokens) and self._is_apart(each) else each
            for each, of_each in ((keys, of_keys), (values, self.labels[values]))
        ]
        kwargs = dict(node.kwargs)
        args: list[Any] = [query, *parts, *node.args[3:]]
        if len(args) > 3:
            args[3] = mask
        elif "attn_mask" in kwargs:
            kwargs["attn_mask"] = mask
        return self.call(node.target, args, kwargs, stream)

    def _mask_of(
        self, mask: Node, of_keys: Label | None, label: Tokens, stream: Stream
    ) -> tuple[Node, tuple[int, ...]]:
        """Return the mask of the queries of `stream`, and the parts of the keys that are hidden from all of them."""
        dim = rank(mask) - 2
        of_mask = self.labels[mask]
        has_rows = dim >= 0 and same_size(size_of(shape_of(mask)[dim]), label.total)
        if isinstance(of_mask, Tokens) and of_mask.dim == dim:
            return self.rows(mask, stream), ()
        if not has_rows:
            return mask, ()
        hidden = hidden_parts(self.known(mask), of_keys, label, stream) if isinstance(of_keys, Tokens) else ()
        rows = self.cut(mask, dim, label, stream)
        if not hidden:
            return rows, ()
        pieces, offset = [], 0
        assert isinstance(of_keys, Tokens)
        for i, (size, _) in enumerate(of_keys.parts):
            if i not in hidden:
                pieces.append(self.slice(rows, dim + 1, offset, offset + size, Stream.TEXT))
            offset = offset + size
        return self.cat(pieces, dim + 1, Stream.TEXT), hidden


def hidden_parts(mask: torch.Tensor | None, of_keys: Tokens, label: Tokens, stream: Stream) -> tuple[int, ...]:
    """Return the parts of the keys that `mask` hides from all queries of `stream` that matter.

    Queries matter if the image's tokens attend to their tokens, directly or through others: padding may attend to
    everything, but nothing attends to padding.
    """
    sizes = [size for size, _ in (*of_keys.parts, *label.parts)]
    if mask is None or stream is Stream.IMAGE or of_keys.parts != label.parts or not all(type(n) is int for n in sizes):
        return ()
    sees = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if sees.shape[-1] != label.total:
        return ()
    sees = sees.reshape(-1, label.total, label.total)
    streams = torch.tensor([of for size, of in label.parts for _ in range(size)], device=mask.device)
    matters = (streams == Stream.IMAGE).expand(len(sees), -1)
    while True:
        more = matters | (sees & matters[:, :, None]).any(1)
        if torch.equal(more, matters):
            break
        matters = more
    asking = sees & (matters & (streams == stream))[:, :, None]
    hidden, offset = [], 0
    for i, (size, of) in enumerate(of_keys.parts):
        if of is not stream and not bool(asking[:, :, offset : offset + size].any()):
            hidden.append(i)
        offset += size
    return tuple(hidden)
