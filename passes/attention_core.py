"""Attention cores: the places of a graph in which queries meet keys and values.

Fused attention is one node. The unfused form, which diffusers' plain `AttnProcessor` and older torch code
write, is a matrix product, a softmax, and a second matrix product. Linear attention (Sana) has no softmax: it
multiplies the values by the keys, and the result by the queries. All three are recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from tgate_compile.passes.operands import operand

aten = torch.ops.aten

FUSED = {aten.scaled_dot_product_attention.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
# The operands (row operand, column operand) of the products that may compute scores or mix values.
PRODUCT_OPERANDS: dict[object, tuple[int, int]] = {
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
            yield AttentionCore(node, operand(node, 0), operand(node, 1), operand(node, 2))
        elif node.target in SOFTMAX:
            scores = _product_above(operand(node, 0))
            mixed = _product_below(node)
            if scores is not None and mixed is not None:
                row, column = PRODUCT_OPERANDS[scores.target]
                _, mixed_column = PRODUCT_OPERANDS[mixed.target]
                yield AttentionCore(mixed, operand(scores, row), operand(scores, column), operand(mixed, mixed_column))
        elif node.target in PRODUCT_OPERANDS:
            row, column = PRODUCT_OPERANDS[node.target]
            state = _product_above(operand(node, row))
            if state is not None:
                value, key = (operand(state, position) for position in PRODUCT_OPERANDS[state.target])
                yield AttentionCore(node, operand(node, column), key, value)


def _product_above(node: Node) -> Node | None:
    """The matrix product that made the scores `node`."""
    while node.target not in PRODUCT_OPERANDS:
        if node.target not in TRANSPARENT:
            return None
        node = operand(node, 0)
    return node


def _product_below(node: Node) -> Node | None:
    """The matrix product that mixes values with the weights `node`."""
    while True:
        product = next((user for user in node.users if user.target in PRODUCT_OPERANDS), None)
        if product is not None:
            row, _ = PRODUCT_OPERANDS[product.target]
            return product if operand(product, row) is node else None
        below = next((user for user in node.users if user.target in TRANSPARENT), None)
        if below is None:
            return None
        node = below
