"""Attention cores: the places of a graph in which queries meet keys and values.

Fused attention is one node. The unfused form, which diffusers' plain `AttnProcessor` and older torch code
write, is a matrix product, a softmax, and a second matrix product; both are recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

aten = torch.ops.aten

FUSED = {aten.scaled_dot_product_attention.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
# The operands (row operand, column operand) of the products that may compute scores or mix values.
PRODUCT_OPERANDS = {
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
# What may stand between the product and the softmax, or between the softmax and the second product:
# scaling, masking, casts, reshapes and dropout, none of which mixes tokens.
TRANSPARENT = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.masked_fill.Scalar,
}


@dataclass(frozen=True)
class AttentionCore:
    """One attention: the node that produces its result, and the query, key and value that enter it."""

    node: Node
    query: Node
    key: Node
    value: Node


def attention_cores(graph: torch.fx.Graph) -> Iterator[AttentionCore]:
    """Every attention of `graph`, in graph order."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in FUSED:
            query, key, value = node.args[:3]
            yield AttentionCore(node, query, key, value)
        elif node.target in SOFTMAX:
            scores = _product_above(node.args[0])
            mixed = _product_below(node)
            if scores is not None and mixed is not None:
                row, column = PRODUCT_OPERANDS[scores.target]
                yield AttentionCore(mixed, scores.args[row], scores.args[column], mixed.args[1])


def _product_above(node: Node) -> Node | None:
    while node.target not in PRODUCT_OPERANDS:
        if node.target not in TRANSPARENT or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return node


def _product_below(node: Node) -> Node | None:
    while True:
        for user in node.users:
            if user.target in PRODUCT_OPERANDS:
                return user if user.args[PRODUCT_OPERANDS[user.target][0]] is node else None
        node_below = next((user for user in node.users if user.target in TRANSPARENT), None)
        if node_below is None:
            return None
        node = node_below
