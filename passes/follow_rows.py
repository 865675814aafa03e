"""Follow rows through operators: which dimension of a result has the rows of an operand.

Rows are followed as long as an operator treats them independently of each other. The operators are listed, and the
rows of an operand of any other operator are taken to be mixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from tgate_compile.passes.graphs import argument, operand, shape_of

aten = torch.ops.aten

#: A number of rows: an int, or a sympy expression if the size is free.
Size = Any


def size_of(value: int | torch.SymInt | Node) -> Size:
    """Return a size as an int or a sympy expression."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else expression
    assert not isinstance(value, Node)
    return int(value)


def same_size(left: Size, right: Size) -> bool:
    """Return whether two sizes are certainly equal."""
    difference = left - right
    return bool(difference == 0)


def rank(node: Node) -> int:
    """Return the number of dimensions of the value of `node`, or of the first if it has several."""
    value = node.meta["val"]
    ndim: int = (value[0] if isinstance(value, (list, tuple)) else value).ndim
    return ndim


def positive(dim: object, ndim: int) -> int:
    """Return a dimension counted from the first."""
    assert isinstance(dim, int)
    return dim + ndim if dim < 0 else dim


def tensors_of(node: Node) -> list[Node]:
    """Return the tensors of a list that is the first argument of `node`."""
    given = node.args[0]
    assert isinstance(given, (list, tuple))
    return [tensor for tensor in given if isinstance(tensor, Node)]


#: Operators that return several runs of rows.
SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}

_SAME = {
    aten.alias.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.float_power.Tensor_Scalar,
    aten.complex.default,
    aten.native_dropout.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}
_RESHAPING = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
_NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default}
_REDUCTIONS = {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.any.dim,
    aten.all.dim,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.prod.dim_int,
    aten.argmax.default,
    aten.argmin.default,
}
_OVER_ONE_DIM = {
    aten.softmax.int: -1,
    aten._softmax.default: -1,
    aten.log_softmax.int: -1,
    aten._log_softmax.default: -1,
    aten.glu.default: -1,
    aten.cumsum.default: -1,
    aten.sort.default: -1,
    aten.topk.default: -1,
}


def placed(node: Node, source: Node, dim: int) -> int | None:
    """Return the dimension of the result of `node` whose rows are those of its operand `source` along `dim`.

    The result is None if rows are mixed, reordered, left out or merged with another dimension.
    """
    target = node.target
    rule = _PLACED.get(target)
    if rule is not None:
        return rule(node, source, dim)
    if target in _RESHAPING:
        return _placed_by_shape(node, source, dim)
    if target in _SAME or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags):
        return dim + rank(node) - rank(source)
    if target in SPLITS:
        along = positive(argument(node, 2, "dim", 0), rank(source))
        return None if along == dim else dim
    if target is operator.getitem:
        return dim
    if target in _NORMS:
        normalized = node.args[1]
        assert isinstance(normalized, (list, tuple))
        return dim if source is node.args[0] and dim < rank(source) - len(normalized) else None
    if target in _OVER_ONE_DIM:
        position = 2 if target is aten.topk.default else 1
        along = positive(argument(node, position, "dim", _OVER_ONE_DIM[target]), rank(source))
        return None if along == dim else dim
    if target in _REDUCTIONS:
        return _placed_by_reduction(node, source, dim)
    return None


def _placed_by_shape(node: Node, source: Node, dim: int) -> int | None:
    """Return the dimension of a reshaped value before which it has as many elements, and which has the same size."""
    before, after = ([size_of(size) for size in shape_of(each)] for each in (source, node))
    for i, size in enumerate(after):
        if same_size(size, before[dim]) and same_size(prod(after[:i]), prod(before[:dim])):
            return i
    return None


def _placed_by_reduction(node: Node, source: Node, dim: int) -> int | None:
    given = argument(node, 2 if node.target is aten.norm.ScalarOpt_dim else 1, "dim")
    if node.target is aten.linalg_vector_norm.default:
        given = argument(node, 2, "dim")
    if given is None or given == []:
        return None
    ndim = rank(source)
    over = {positive(each, ndim) for each in (given if isinstance(given, (list, tuple)) else [given])}
    if dim in over:
        return None
    return dim if rank(node) == ndim else dim - sum(each < dim for each in over)


def _placed_by_order(order: Callable[[Node, int], Sequence[int]]) -> Callable[[Node, Node, int], int | None]:
    """Return the rule of an operator that reorders dimensions, as `order` gives them from old to new position."""

    def rule(node: Node, source: Node, dim: int) -> int | None:
        return list(order(node, rank(source))).index(dim)

    return rule


def _transposed(node: Node, ndim: int) -> Sequence[int]:
    order = list(range(ndim))
    first, second = (-2, -1) if len(node.args) < 3 else (node.args[1], node.args[2])
    a, b = positive(first, ndim), positive(second, ndim)
    order[a], order[b] = b, a
    return order


def _permuted(node: Node, ndim: int) -> Sequence[int]:
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return [positive(dim, ndim) for dim in dims]


def _moved(node: Node, ndim: int) -> Sequence[int]:
    given, wanted = ([each] if isinstance(each, int) else list(each) for each in node.args[1:3])  # type: ignore[arg-type]
    sources = [positive(dim, ndim) for dim in given]
    destinations = [positive(dim, ndim) for dim in wanted]
    rest = [dim for dim in range(ndim) if dim not in sources]
    order = [-1] * ndim
    for source, destination in zip(sources, destinations, strict=True):
        order[destination] = source
    return [rest.pop(0) if dim < 0 else dim for dim in order]


def _placed_unsqueezed(node: Node, source: Node, dim: int) -> int | None:
    return dim + (positive(node.args[1], rank(node)) <= dim)


def _placed_squeezed(node: Node, source: Node, dim: int) -> int | None:
    shape = shape_of(source)
    if len(node.args) < 2:
        removed = [i for i, size in enumerate(shape) if size == 1]
    else:
        given = node.args[1]
        dims = given if isinstance(given, (list, tuple)) else [given]
        removed = [i for i in (positive(each, len(shape)) for each in dims) if shape[i] == 1]
    return dim - sum(i < dim for i in removed)


def _placed_repeated(node: Node, source: Node, dim: int) -> int | None:
    repeats = node.args[1]
    assert isinstance(repeats, (list, tuple))
    place = dim + len(repeats) - rank(source)
    return place if repeats[place] == 1 else None


def _placed_interleaved(node: Node, source: Node, dim: int) -> int | None:
    along = argument(node, 2, "dim")
    return dim if along is not None and positive(along, rank(source)) != dim else None


def _placed_beside(node: Node, source: Node, dim: int) -> int | None:
    """For operators that take one index of another dimension."""
    along = positive(argument(node, 1, "dim", 0), rank(source))
    return None if along == dim else dim - (along < dim)


def _placed_unless_along(node: Node, source: Node, dim: int) -> int | None:
    position = 2 if node.target in (aten.slice_scatter.default, aten.select_scatter.default) else 1
    along = positive(argument(node, position, "dim", 0), rank(operand(node, 0) if position == 2 else source))
    if node.target is aten.select_scatter.default:
        if source is node.args[1]:
            return dim + (along <= dim)
        return None if along == dim else dim
    return None if along == dim else dim


def _placed_stacked(node: Node, source: Node, dim: int) -> int | None:
    return dim + (positive(argument(node, 1, "dim", 0), rank(node)) <= dim)


def _placed_flipped(node: Node, source: Node, dim: int) -> int | None:
    dims = argument(node, 2 if node.target is aten.roll.default else 1, "dims", [])
    assert isinstance(dims, (list, tuple))
    along = {positive(each, rank(source)) for each in dims}
    return dim if along and dim not in along else None


def _placed_padded(node: Node, source: Node, dim: int) -> int | None:
    pads = node.args[1]
    assert isinstance(pads, (list, tuple))
    position = 2 * (rank(source) - 1 - dim)
    return dim if not any(pads[position : position + 2]) else None


def _placed_projected(node: Node, source: Node, dim: int) -> int | None:
    return dim if source is node.args[0] and dim < rank(source) - 1 else None


def _placed_multiplied(node: Node, source: Node, dim: int) -> int | None:
    left, right = operand(node, 0), operand(node, 1)
    if left is right or min(rank(left), rank(right)) < 2:
        return None
    ndim = rank(source)
    contracted = ndim - 1 if source is left else ndim - 2
    return None if dim == contracted else dim + rank(node) - ndim


_PLACED: Mapping[Any, Callable[[Node, Node, int], int | None]] = {
    aten.transpose.int: _placed_by_order(_transposed),
    aten.swapaxes.default: _placed_by_order(_transposed),
    aten.t.default: _placed_by_order(_transposed),
    aten.mT.default: _placed_by_order(_transposed),
    aten.permute.default: _placed_by_order(_permuted),
    aten.movedim.int: _placed_by_order(_moved),
    aten.movedim.intlist: _placed_by_order(_moved),
    aten.view_as_complex.default: lambda node, source, dim: dim,
    aten.view_as_real.default: lambda node, source, dim: dim,
    aten.unsqueeze.default: _placed_unsqueezed,
    aten.squeeze.default: _placed_squeezed,
    aten.squeeze.dim: _placed_squeezed,
    aten.squeeze.dims: _placed_squeezed,
    aten.expand.default: lambda node, source, dim: dim + rank(node) - rank(source),
    aten.repeat.default: _placed_repeated,
    aten.repeat_interleave.self_int: _placed_interleaved,
    aten.select.int: _placed_beside,
    aten.unbind.int: _placed_beside,
    aten.slice.Tensor: _placed_unless_along,
    aten.narrow.default: _placed_unless_along,
    aten.cat.default: _placed_unless_along,
    aten.concat.default: _placed_unless_along,
    aten.slice_scatter.default: _placed_unless_along,
    aten.select_scatter.default: _placed_unless_along,
    aten.stack.default: _placed_stacked,
    aten.roll.default: _placed_flipped,
    aten.flip.default: _placed_flipped,
    aten.constant_pad_nd.default: _placed_padded,
    aten.pad.default: _placed_padded,
    aten.linear.default: _placed_projected,
    aten.matmul.default: _placed_multiplied,
    aten.bmm.default: _placed_multiplied,
    aten.mm.default: _placed_multiplied,
}
