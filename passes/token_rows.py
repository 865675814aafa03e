"""Find which tokens of each value belong to the image, to its references, or to the text.

In joint attention, the tokens of text and image are in one sequence. Every value is labelled with the streams that its
rows belong to. A row belongs to the image if it depends on the latents other than through keys and values of an
attention. The rows of the text's tokens depend on the latents only through keys and values, in every block and whatever
the order of the tokens. The tokens of reference images are rows of the latents that are known in advance.

An operator keeps the rows apart if it treats them independently of each other (a linear layer, a norm over features,
an attention's queries). The result of any other operator on rows of several streams belongs as a whole to the last of
these streams. That is always correct: it only means that these tokens cannot be separated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch.fx import Node

from tgate_compile.passes.attention_core import FUSED, LAYOUT, attention_cores
from tgate_compile.passes.find_sites import depends_on, value_inputs
from tgate_compile.passes.follow_rows import SPLITS, Size, placed, positive, rank, same_size, size_of, tensors_of
from tgate_compile.passes.graphs import Origins, argument, operand, shape_of

aten = torch.ops.aten

#: Operators that copy or rearrange keys and values on their way to an attention. A copy for each group of heads makes
#: them larger, so they are cached before it.
_BEFORE_ATTENTION = LAYOUT | {aten.repeat.default, aten.repeat_interleave.self_int}


class Stream(IntEnum):
    """The tokens that a row belongs to.

    Rows of the text, and rows that belong to no token (weights, tables of positions), are `TEXT`.
    """

    TEXT = 0
    REFERENCE = 1
    IMAGE = 2


#: A run of rows of one stream: their number, and the stream.
Part = tuple[Size, Stream]


@dataclass(frozen=True)
class Tokens:
    """The rows of a value in which the streams alternate along one dimension.

    Attributes:
        dim: the dimension of the tokens.
        parts: the consecutive runs of rows; there are at least two.
    """

    dim: int
    parts: tuple[Part, ...]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that some of the rows belong to."""
        return tuple(sorted({stream for _, stream in self.parts}))

    @property
    def total(self) -> Size:
        """The number of all rows."""
        return sum(size for size, _ in self.parts)

    def count(self, stream: Stream) -> Size:
        """Return the number of the rows of `stream`."""
        return sum(size for size, of in self.parts if of is stream)

    def between(self, start: Size, stop: Size) -> tuple[Part, ...] | None:
        """Return the parts of the rows from `start` to `stop`; None if they depend on free sizes."""
        found: list[Part] = []
        offset: Size = 0
        for size, stream in self.parts:
            first, last = _larger(start, offset), _smaller(stop, offset + size)
            if first is None or last is None:
                return None
            rows = last - first
            if not isinstance(rows, int):
                rows = rows if not rows.is_Integer else int(rows)
            if not isinstance(rows, int) or rows > 0:
                if not isinstance(rows, int) and rows.is_nonpositive:
                    continue
                found.append((rows, stream))
            offset = offset + size
        return tuple(found)


#: The rows of a value: all of one stream, or of several.
Label = Stream | Tokens


def label_of_input(node: Node, origins: Origins) -> Label:
    """Return the label of the input `node`."""
    if node.name not in origins.latents:
        return Stream.TEXT
    if origins.image is None or node.name != origins.latents[0]:
        return Stream.IMAGE
    dim, start, stop = origins.image
    total = size_of(shape_of(node)[dim])
    parts = [(start, Stream.REFERENCE), (stop - start, Stream.IMAGE), (total - stop, Stream.REFERENCE)]
    return joined([part for part in parts if not same_size(part[0], 0)], dim)


class Labels(dict[Node, Label]):
    """The labels of the values of a graph.

    Attributes:
        of_time: the values that depend on the timestep, but on no condition.
    """

    def __init__(self, of_time: Collection[Node] = ()) -> None:
        super().__init__()
        self.of_time = of_time


def _larger(left: Size, right: Size) -> Size | None:
    return _chosen(left, right, larger=True)


def _smaller(left: Size, right: Size) -> Size | None:
    return _chosen(left, right, larger=False)


def _chosen(left: Size, right: Size, *, larger: bool) -> Size | None:
    difference = left - right
    if not isinstance(difference, int):
        if difference.is_nonnegative or difference.is_nonpositive:  # free sizes are positive
            return left if bool(difference.is_nonnegative) is larger else right
        return None
    return left if (difference >= 0) is larger else right


def joined(parts: Iterable[Part], dim: int) -> Label:
    """Return the label of rows that consist of `parts` along `dim`."""
    merged: list[Part] = []
    for size, stream in parts:
        if merged and merged[-1][1] is stream:
            merged[-1] = (merged[-1][0] + size, stream)
        else:
            merged.append((size, stream))
    if len(merged) > 1:
        return Tokens(dim, tuple(merged))
    return merged[0][1] if merged else Stream.TEXT


def token_rows(graph: torch.fx.Graph, origins: Origins) -> Labels:
    """Return the label of each value of `graph`."""
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    of_times, of_conditions = (
        depends_on(graph, [inputs[name] for name in names if name in inputs])
        for names in (origins.times, origins.conditions)
    )
    labels = Labels(of_times - of_conditions)
    for node in graph.nodes:  # in topological order
        if node.op == "placeholder":
            labels[node] = label_of_input(node, origins)
        elif node.op != "output":
            labels[node] = label_of(node, labels)
    return labels


def label_of(node: Node, labels: Labels) -> Label:
    """Return the label of the value of `node`, given those of its operands."""
    if is_size(node):
        return Stream.TEXT
    sources = [source for source in value_inputs(node) if not is_size(source)]
    if node.target in FUSED:
        return _label_of_attention(node, labels)
    if is_plain_copy(node):
        return labels[operand(node, 1)]
    special = _ALONG.get(node.target)
    if special is not None:
        found = special(node, labels)
        if found is not None:
            return found
    if not any(isinstance(labels[source], Tokens) for source in sources):
        return last_of(labels[source] for source in sources)
    result: Tokens | None = None
    for source in sources:
        label = labels[source]
        if isinstance(label, Tokens):
            dim = placed(node, source, label.dim)
            found = None if dim is None else Tokens(dim, label.parts)
            if found is None or (result is not None and result != found):
                return last_of(labels[source] for source in sources)
            result = found
        elif label is not Stream.TEXT:
            return last_of(labels[source] for source in sources)  # it reaches the rows of other streams
    assert result is not None
    return result


def last_of(labels: Iterable[Label]) -> Stream:
    """Return the last of all streams in `labels`."""
    return max((label.streams[-1] if isinstance(label, Tokens) else label for label in labels), default=Stream.TEXT)


def is_plain_copy(node: Node) -> bool:
    """Return whether `node` is an assignment whose result is the second operand, whatever was there before."""
    if node.target is not aten.copy.default:
        return False
    before, source = (operand(node, position).meta["val"] for position in (0, 1))
    sizes = [[size_of(size) for size in each.shape] for each in (before, source)]
    return len(sizes[0]) == len(sizes[1]) and all(map(same_size, *sizes)) and before.dtype == source.dtype


def is_size(node: Node) -> bool:
    """Return whether the value of `node` is a size, or a number computed from sizes."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _label_of_attention(node: Node, labels: Labels) -> Label:
    """Return the label of an attention's result, whose rows are those of its queries."""
    query = labels[operand(node, 0)]
    if not isinstance(query, Tokens):
        return query
    if query.dim != rank(operand(node, 0)) - 2 or argument(node, 5, "is_causal", False):
        return last_of([query])
    return query


def _along_cat(node: Node, labels: Labels) -> Label | None:
    tensors = tensors_of(node)
    dim = positive(argument(node, 1, "dim", 0), rank(node))
    found = [label_of_operand(tensor, tensors, labels) for tensor in tensors]
    if any(isinstance(label, Tokens) and label.dim != dim for label in found):
        return None
    parts: list[Part] = []
    for tensor, label in zip(tensors, found, strict=True):
        parts += label.parts if isinstance(label, Tokens) else [(size_of(shape_of(tensor)[dim]), label)]
    return joined(parts, dim)


def label_of_operand(tensor: Node, among: Sequence[Node], labels: Labels) -> Label:
    """Return the label of one of the values that are concatenated, which may be a token made of the timestep."""
    label = labels[tensor]
    if label is Stream.TEXT and tensor in labels.of_time and any(labels[each] is not Stream.TEXT for each in among):
        return Stream.IMAGE
    return label


def _along_slice(node: Node, labels: Labels) -> Label | None:
    label = labels[operand(node, 0)]
    span = span_of_slice(node)
    if not isinstance(label, Tokens) or span is None or span.dim != label.dim:
        return None if not isinstance(label, Tokens) or span is not None else last_of([label])
    parts = label.between(span.start, span.stop)
    return last_of([label]) if parts is None else joined(parts, label.dim)


def _along_splits(node: Node, labels: Labels) -> Label | None:
    """Return the label of the value that is split; `_along_result` finds that of each result."""
    return labels[operand(node, 0)]


def _along_result(node: Node, labels: Labels) -> Label | None:
    """Return the label of one result of a split, or of any result of another operator."""
    label = labels[operand(node, 0)]
    span = span_of_result(node)
    if not isinstance(label, Tokens) or span is None or span.dim != label.dim:
        return label
    parts = label.between(span.start, span.stop)
    return last_of([label]) if parts is None else joined(parts, label.dim)


def _along_scatter(node: Node, labels: Labels) -> Label | None:
    base, source = labels[operand(node, 0)], labels[operand(node, 1)]
    span = span_of_slice(node, first=2)
    if span is None:
        return None if base == source else last_of([base, source])
    if any(isinstance(label, Tokens) and label.dim != span.dim for label in (base, source)):
        return None
    total = size_of(shape_of(node)[span.dim])
    whole = base if isinstance(base, Tokens) else Tokens(span.dim, ((total, base),))
    before, after = whole.between(0, span.start), whole.between(span.stop, total)
    if before is None or after is None:
        return last_of([base, source])
    middle = source.parts if isinstance(source, Tokens) else ((span.stop - span.start, source),)
    return joined((*before, *middle, *after), span.dim)


def _along_pad_sequence(node: Node, labels: Labels) -> Label | None:
    """Return the label of sequences padded to one length, which must have their live rows at the same places."""
    tensors = tensors_of(node)
    first = labels[tensors[0]]
    if not isinstance(first, Tokens) and all(labels[tensor] is first for tensor in tensors):
        return first
    dim = 1 if argument(node, 1, "batch_first", False) else 0
    length = size_of(shape_of(node)[dim])
    padded = []
    for tensor in tensors:
        label = labels[tensor]
        size = size_of(shape_of(tensor)[0])
        parts = label.parts if isinstance(label, Tokens) and label.dim == 0 else ((size, last_of([label])),)
        rest = length - size
        padded.append(joined((*parts, *([] if rest == 0 else [(rest, Stream.TEXT)])), dim))
    return padded[0] if all(label == padded[0] for label in padded) else last_of(padded)


def _along_pad(node: Node, labels: Labels) -> Label | None:
    """Return the label of rows after which zeros are added; the last rows must not belong to the image."""
    label = labels[operand(node, 0)]
    pads = padding_of(node)
    if not isinstance(label, Tokens) or pads is None or pads[0] != label.dim or label.parts[-1][1] is not Stream.TEXT:
        return None
    return joined((*label.parts, (pads[1], Stream.TEXT)), label.dim)


def padding_of(node: Node) -> tuple[int, int] | None:
    """Return the only dimension to which a padding adds rows, and their number; None unless all come last."""
    pads = node.args[1]
    assert isinstance(pads, (list, tuple))
    added = [(rank(node) - 1 - i // 2, i % 2, size) for i, size in enumerate(pads) if size]
    if len(added) != 1 or not added[0][1] or not isinstance(added[0][2], int):
        return None
    return added[0][0], added[0][2]


_ALONG: Mapping[Any, Callable[[Node, Labels], Label | None]] = {
    aten.cat.default: _along_cat,
    aten.concat.default: _along_cat,
    aten.concatenate.default: _along_cat,
    aten.slice.Tensor: _along_slice,
    aten.narrow.default: _along_slice,
    aten.slice_scatter.default: _along_scatter,
    aten.pad_sequence.default: _along_pad_sequence,
    aten.constant_pad_nd.default: _along_pad,
    aten.pad.default: _along_pad,
    operator.getitem: _along_result,
    **dict.fromkeys(SPLITS, _along_splits),
}


@dataclass(frozen=True)
class Span:
    """A run of rows: those from `start` to `stop` along `dim`."""

    dim: int
    start: Size
    stop: Size


def span_of_slice(node: Node, *, first: int = 1) -> Span | None:
    """Return the rows that a slice takes or writes, whose arguments begin at position `first`; None with a step."""
    dim = positive(argument(node, first, "dim", 0), rank(operand(node, 0)))
    size = size_of(shape_of(operand(node, 0))[dim])
    if node.target is aten.narrow.default:
        begin = size_of(argument(node, 2, "start"))  # type: ignore[arg-type]
        length = size_of(argument(node, 3, "length"))  # type: ignore[arg-type]
        return Span(dim, begin, begin + length)
    if argument(node, first + 3, "step", 1) != 1:
        return None
    start = _bound(argument(node, first + 1, "start"), 0, size)
    stop = _bound(argument(node, first + 2, "end"), size, size)
    return None if start is None or stop is None else Span(dim, start, stop)


def _bound(given: Any, default: Size, size: Size) -> Size | None:
    """Return a bound of a slice counted from the beginning, and no larger than `size`."""
    if given is None:
        return default
    bound = size_of(given)
    negative = bound < 0 if isinstance(bound, int) else bound.is_negative
    if negative is None:
        return None
    if negative:
        bound = bound + size
    elif isinstance(bound, int) and bound >= torch.iinfo(torch.int64).max - 1:
        return size
    return _smaller(bound, size)


def span_of_result(node: Node) -> Span | None:
    """Return the rows that one result of a split (a `getitem`) consists of; None if it is not one of a split."""
    split, index = operand(node, 0), node.args[1]
    if split.target not in SPLITS or not isinstance(index, int):
        return None
    dim = positive(argument(split, 2, "dim", 0), rank(operand(split, 0)))
    sizes = [size_of(value.shape[dim]) for value in split.meta["val"]]
    return Span(dim, sum(sizes[:index]), sum(sizes[: index + 1]))


def tokens_left(graph: torch.fx.Graph, origins: Origins, streams: Collection[Stream]) -> list[Node]:
    """Return the attentions of `graph` that have queries of the tokens of `streams` alone, and depend on the latents.

    A graph that takes the keys and values of these tokens as inputs should have no such attention: nothing else needs
    the tokens. Attentions of the text that do not depend on the latents may pool it for the modulation.
    """
    labels = token_rows(graph, origins)
    of_latents = depends_on(graph, [node for node in graph.nodes if node.name in origins.latents])
    left = []
    for core in attention_cores(graph):
        if core.node not in of_latents:
            continue
        queries = [core.scores[0][0]] if core.is_ordered else [one for pair in core.scores for one in pair]
        found = [labels[query] for query in queries]
        if Stream.IMAGE not in found and any(stream in streams for label in found for stream in streams_of(label)):
            left.append(core.node)
    return left


def streams_of(label: Label) -> tuple[Stream, ...]:
    """Return the streams in `label`."""
    return label.streams if isinstance(label, Tokens) else (label,)


def mixing_nodes(graph: torch.fx.Graph, labels: Labels) -> list[Node]:
    """Return the operators that combine the image's tokens with others in a way that cannot be separated."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.users
        and labels[node] is Stream.IMAGE
        and node.target not in (*FUSED, *_ALONG)
        and any(isinstance(labels[source], Tokens) for source in value_inputs(node))
    ]


@dataclass(frozen=True)
class JointAttention:
    """An attention of the image's tokens, some of whose keys and values belong to other tokens.

    Attributes:
        node: the attention.
        keys: the node of the keys, before copies that only make them larger.
        values: the node of the values, in the same place.
    """

    node: Node
    keys: Node
    values: Node


def joint_attentions(graph: torch.fx.Graph, labels: Labels, streams: Collection[Stream]) -> list[JointAttention]:
    """Return the attentions of `graph` in which the image's tokens attend to those of `streams`, in graph order.

    The result is empty if no attention has keys of both: then the text, if there is any, is attended to by
    cross-attentions alone.
    """
    found: list[JointAttention] = []
    is_joint = False
    for node in graph.nodes:
        if node.target not in FUSED or Stream.IMAGE not in streams_of(labels[operand(node, 0)]):
            continue
        keys, values = operand(node, 1), operand(node, 2)
        if any(not _is_cut(each, labels, streams) for each in (keys, values)):
            continue
        is_joint = is_joint or isinstance(labels[keys], Tokens)
        found.append(JointAttention(node, _smallest(keys, labels), _smallest(values, labels)))
    return found if is_joint else []


def _is_cut(node: Node, labels: Labels, streams: Collection[Stream]) -> bool:
    """Return whether some of the keys or values `node` belong to `streams`."""
    label = labels[node]
    is_apart = not isinstance(label, Tokens) or label.dim == rank(node) - 2
    return is_apart and any(stream in streams for stream in streams_of(label))


def _smallest(node: Node, labels: Labels) -> Node:
    """Return the smallest of the values that `node` is derived from by copies and changes of layout."""
    best = node
    while node.target in _BEFORE_ATTENTION:
        node = operand(node, 0)
        if labels[node] is Stream.IMAGE:
            break
        if _nbytes(node) < _nbytes(best):
            best = node
    return best


def _nbytes(node: Node) -> int:
    size: int = node.meta["val"].dtype.itemsize
    for dim in shape_of(node):
        size *= int(dim.node.hint or 1) if isinstance(dim, torch.SymInt) else dim
    return size
