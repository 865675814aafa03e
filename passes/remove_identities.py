"""Remove the operators that hand on what they are given."""

from __future__ import annotations

import torch
from torch.fx import Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.operands import operand, shape_of

aten = torch.ops.aten


def remove_identities(graph_module: torch.fx.GraphModule) -> PassResult:
    """Take the operand of each such operator in its place; the operators themselves are left dead.

    They cost an eager run a little, and other formats know some of them only where they do something: ONNX has no
    squeeze of a dimension that is not 1.
    """
    count = 0
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(operand(node, 0))
            count += 1
    return PassResult(count)


def _is_identity(node: Node) -> bool:
    if node.target is aten.dropout.default:
        return node.args[2] is False  # not training
    if node.target is aten.squeeze.dim:
        return len(shape_of(operand(node, 0))) == len(shape_of(node))
    return False
