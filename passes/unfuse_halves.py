"""Take halves of tensors by slices."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Graph, Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call
from tgate_compile.passes.operands import argument, operand, shape_of

aten = torch.ops.aten


def unfuse_halves(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace what chunks a tensor, and means over a first dimension of 2, by slices and arithmetic.

    These are a gated linear unit's halves, and the guidance halves of what is cached. Shapes must be fixed.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target is aten.chunk.default:
            _slice_chunks(graph, node)
        elif node.target is aten.mean.dim and _is_of_two(node):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_mean(graph, node))
            graph.erase_node(node)
        else:
            continue
        count += 1
    return PassResult(count)


def _slice_chunks(graph: Graph, node: Node) -> None:
    value = operand(node, 0)
    dim = cast(int, argument(node, 2, "dim", 0))
    begin = 0
    for position, chunk in enumerate(node.meta["val"]):
        end = begin + chunk.shape[dim]
        for item in [user for user in node.users if user.args[1] == position]:
            with graph.inserting_before(item):
                item.replace_all_uses_with(add_call(graph, aten.slice.Tensor, value, dim, begin, end))
            graph.erase_node(item)
        begin = end
    graph.erase_node(node)


def _is_of_two(node: Node) -> bool:
    keeps = argument(node, 2, "keepdim", False)
    return shape_of(operand(node, 0))[0] == 2 and argument(node, 1, "dim") == [0] and not keeps


def _mean(graph: Graph, node: Node) -> Node:
    value, dtype = operand(node, 0), node.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = add_call(graph, aten.to.dtype, value, dtype)
    first, second = (add_call(graph, aten.slice.Tensor, value, 0, half, half + 1) for half in (0, 1))
    mean = add_call(graph, aten.mul.Tensor, add_call(graph, aten.add.Tensor, first, second), 0.5)
    return add_call(graph, aten.reshape.default, mean, list(shape_of(node)))
