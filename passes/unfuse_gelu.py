"""Write GELU's approximation by a tanh as what it is."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call
from tgate_compile.passes.operands import operand

aten = torch.ops.aten

#: Of the approximation: `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + CUBE * x ** 3)))`.
CUBE = 0.044715


def unfuse_gelu(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace approximated GELUs in float32 by arithmetic and a tanh.

    ExecuTorch 1.4 hands them to XNNPACK as exact ones, which are up to 5e-4 away. In other dtypes XNNPACK takes none.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target is not aten.gelu.default or node.kwargs.get("approximate", "none") != "tanh":
            continue
        if node.meta["val"].dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_unfused(graph, operand(node, 0)))
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _unfused(graph: Graph, value: Node) -> Node:
    square = add_call(graph, aten.mul.Tensor, value, value)
    factor = add_call(graph, aten.add.Tensor, add_call(graph, aten.mul.Tensor, square, CUBE), 1.0)
    argument = add_call(graph, aten.mul.Tensor, add_call(graph, aten.mul.Tensor, value, factor), math.sqrt(2 / math.pi))
    weight = add_call(graph, aten.add.Tensor, add_call(graph, aten.tanh.default, argument), 1.0)
    return add_call(graph, aten.mul.Tensor, add_call(graph, aten.mul.Tensor, value, weight), 0.5)
