"""Write attention as matrix products and a softmax."""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Graph, Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call
from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.operands import argument, operand, shape_of

aten = torch.ops.aten


def unfuse_attention(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace fused attentions without a mask, or with one that is added, by products in three dimensions.

    torch's own decomposition looks for rows that are masked entirely, with operators that runtimes for devices leave to
    slow kernels; a mask of finite numbers has no such rows. Causal attentions, boolean masks, and keys with fewer heads
    than queries are left alone. Shapes must be fixed. Views become reshapes: the result is laid out differently.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target in FUSED and _is_plain(node):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_unfused(graph, node))
            graph.erase_node(node)
            count += 1
    views = graph.find_nodes(op="call_function", target=aten.view.default) if count else ()
    for node in views:
        node.target = aten.reshape.default
    return PassResult(count)


def _is_plain(node: Node) -> bool:
    mask = argument(node, 3, "attn_mask")
    query, key, value = (shape_of(operand(node, position)) for position in range(3))
    return (
        (mask is None or (isinstance(mask, Node) and mask.meta["val"].is_floating_point()))
        and not argument(node, 5, "is_causal")
        and query[:-2] == key[:-2] == value[:-2]
    )


def _unfused(graph: Graph, node: Node) -> Node:
    query, key, value = (operand(node, position) for position in range(3))
    *outer, queries, dim = shape_of(query)
    keys, value_dim = shape_of(value)[-2:]
    batch = prod(outer)
    scale, mask = node.kwargs.get("scale"), argument(node, 3, "attn_mask")
    rows = add_call(graph, aten.reshape.default, query, [batch, queries, dim])
    rows = add_call(graph, aten.mul.Tensor, rows, dim**-0.5 if scale is None else scale)
    columns = add_call(graph, aten.reshape.default, key, [batch, keys, dim])
    scores = add_call(graph, aten.bmm.default, rows, add_call(graph, aten.transpose.int, columns, 1, 2))
    if isinstance(mask, Node):
        scores = add_call(graph, aten.reshape.default, scores, [*outer, queries, keys])
        scores = add_call(graph, aten.add.Tensor, scores, mask)
        scores = add_call(graph, aten.reshape.default, scores, [batch, queries, keys])
    weights = add_call(graph, aten.softmax.int, scores, -1)
    values = add_call(graph, aten.reshape.default, value, [batch, keys, value_dim])
    mixed = add_call(graph, aten.bmm.default, weights, values)  # [batch, queries, value_dim]
    return add_call(graph, aten.reshape.default, mixed, [*outer, queries, value_dim])
