"""Write group and layer norms as matrix products and arithmetic."""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch.fx import Graph, Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call
from tgate_compile.passes.operands import argument, operand, shape_of

aten = torch.ops.aten


def unfuse_norms(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace group and layer norms in float32, for runtimes that have kernels for products and none for norms.

    A mean is a product with a constant row, whose sums are as exact as the dtype: norms in float16 are left alone, for
    their kernels sum in float32. Shapes must be fixed.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target not in _UNFUSED or node.meta["val"].dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_UNFUSED[node.target](graph, node))
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _group_norm(graph: Graph, node: Node) -> Node:
    """`group_norm(input, num_groups, weight, bias, eps)`: [batch, channels, *]."""
    value, groups = operand(node, 0), cast(int, node.args[1])
    batch, channels, *rest = shape_of(value)
    normed = _standardized(graph, value, batch * groups, argument(node, 4, "eps", 1e-5))
    weights = (argument(node, 2, "weight"), argument(node, 3, "bias"))
    return _scaled(graph, normed, weights, [1, channels, *[1] * len(rest)])


def _layer_norm(graph: Graph, node: Node) -> Node:
    """`layer_norm(input, normalized_shape, weight, bias, eps)`: [*, *normalized_shape]."""
    value, normalized = operand(node, 0), cast("list[int]", node.args[1])
    rows = prod(shape_of(value)) // prod(normalized)
    normed = _standardized(graph, value, rows, argument(node, 4, "eps", 1e-5))
    return _scaled(graph, normed, (argument(node, 2, "weight"), argument(node, 3, "bias")), list(normalized))


_UNFUSED = {aten.group_norm.default: _group_norm, aten.layer_norm.default: _layer_norm}


def _standardized(graph: Graph, value: Node, rows: int, eps: object) -> Node:
    """`value`, taken as so many rows, each with mean 0 and variance 1."""
    shape = list(shape_of(value))
    dim = prod(shape) // rows
    flat = add_call(graph, aten.reshape.default, value, [rows, dim])
    mean = _constant_row(graph, dim, 1.0 / dim, value)
    centred = add_call(graph, aten.sub.Tensor, flat, add_call(graph, aten.linear.default, flat, mean))
    squares = add_call(graph, aten.mul.Tensor, centred, centred)
    variance = add_call(graph, aten.linear.default, squares, mean)  # [rows, 1]
    factor = add_call(graph, aten.rsqrt.default, add_call(graph, aten.add.Tensor, variance, eps))
    return add_call(graph, aten.reshape.default, add_call(graph, aten.mul.Tensor, centred, factor), shape)


def _constant_row(graph: Graph, size: int, number: float, like: Node) -> Node:
    """[1, size], to be folded: that nobody computes it while the graph runs is left to the caller."""
    fake = like.meta["val"]
    kwargs = {"dtype": fake.dtype, "device": fake.device}
    row = graph.call_function(aten.full.default, ([1, size], number), kwargs)
    with fake.fake_mode:
        row.meta["val"] = aten.full.default([1, size], number, **kwargs)
    return row


def _scaled(graph: Graph, normed: Node, weights: tuple[object, object], shape: list[int]) -> Node:
    """`normed` times a weight plus a bias, if there are such, which have `shape`."""
    for weight, target in zip(weights, (aten.mul.Tensor, aten.add.Tensor), strict=True):
        if isinstance(weight, Node):
            normed = add_call(graph, target, normed, add_call(graph, aten.reshape.default, weight, shape))
    return normed
