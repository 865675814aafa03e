"""Find attention cores: the places in a graph where queries, keys and values are combined.

Three forms are recognized, independent of the module that they come from:

- One operator: `scaled_dot_product_attention`, and other operators named after attention that take a query, a key and
  a value first (a fused kernel of another package).
- Products around a softmax: a matrix product (`matmul`, `bmm`, `baddbmm`, `einsum`), a softmax, and a second product.
  Scaling, masks, casts and changes of layout may occur between them, and the softmax may be written out with `exp`.
- Linear attention (Sana), which has no softmax: a product of keys and values, and its product with the queries.

The position of an operand does not show which one is the query, since keys may be on either side and transposed. The
caller determines it from the inputs that the operands depend on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

aten = torch.ops.aten

FUSED = {aten.scaled_dot_product_attention.default}
#: The positions of the two operands in matrix products, which may compute scores or combine values.
PRODUCT_OPERANDS: dict[object, tuple[int, int]] = {
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.addmm.default: (1, 2),
}
NORMALIZING = {aten.softmax.int, aten._softmax.default, aten.exp.default}
#: Changes of layout, casts, dropout and scaling, which do not mix tokens and are linear in their first operand.
LAYOUT = {
    aten.alias.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.t.default,
    aten.mT.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.detach.default,
    aten.mul.Scalar,
    aten.div.Scalar,
}
SCALING = {aten.mul.Tensor, aten.div.Tensor}
#: All operators that may occur between the products of an attention with a softmax, including masks, soft capping and
#: numerical stabilization.
TRANSPARENT = LAYOUT | SCALING | {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.tanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.nan_to_num.default,
}  # fmt: skip


@dataclass(frozen=True)
class AttentionCore:
    """One attention in a graph.

    Attributes:
        node: the node that produces the result.
        scores: the two operands, query and key in any order, of each product that computes scores. There are several
            if scores are sums, as with relative positions.
        value: the node of the values.
        is_ordered: whether the query comes first in `scores`, as in fused operators and linear attention.
        is_linear: whether it is linear attention.
    """

    node: Node
    scores: tuple[tuple[Node, Node], ...]
    value: Node
    is_ordered: bool = False
    is_linear: bool = False


def attention_cores(graph: torch.fx.Graph) -> Iterator[AttentionCore]:
    """Yield all attentions of `graph`, in graph order."""
    cores = []
    products_of_scores: set[Node] = set()
    for node in graph.nodes:
        if _is_fused(node):
            query, key, value = node.args[:3]
            cores.append(AttentionCore(_first_result(node), ((query, key),), value, is_ordered=True))
            continue
        operands = product_operands(node)
        if operands is None:
            continue
        for weights, value in (operands, operands[::-1]):
            scores = _scores_above(weights)
            if scores:
                products_of_scores |= scores
                pairs = tuple(pair for product in scores if (pair := product_operands(product)) is not None)
                cores.append(AttentionCore(node, pairs, value))
                break
        else:
            for state, query in (operands, operands[::-1]):
                pair = product_operands(_state_above(state))
                if pair is not None:
                    cores.append(AttentionCore(node, ((query, pair[0]),), pair[1], is_ordered=True, is_linear=True))
                    break
    # A product that computes scores is not linear attention, whatever produces its operands.
    yield from (core for core in cores if not (core.is_linear and core.node in products_of_scores))


def product_operands(node: Node) -> tuple[Node, Node] | None:
    """Return the two operands of a matrix product; None if `node` is not one."""
    if node.target is aten.einsum.default:
        operands = node.args[1]
        assert isinstance(operands, (list, tuple))
        pair = tuple(operands)
    elif node.target in PRODUCT_OPERANDS:
        pair = tuple(node.args[position] for position in PRODUCT_OPERANDS[node.target])
    else:
        return None
    return pair if len(pair) == 2 and all(isinstance(one, Node) for one in pair) else None


def _is_fused(node: Node) -> bool:
    if node.op != "call_function" or len(node.args) < 3 or not all(isinstance(arg, Node) for arg in node.args[:3]):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        name = str(node.target)
    else:
        return False
    return "attention" in name or "attn" in name


def _first_result(node: Node) -> Node:
    """Return `node`, or the node of its first result if it has several (the others are statistics)."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return node
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), node)


def _scores_above(weights: Node) -> set[Node]:
    """Return the products whose scores are normalized in `weights`; empty if it is not a softmax of products."""
    found: set[Node] = set()
    seen = {(weights, False)}
    queue = [(weights, False)]
    for node, normalized in queue:  # grows during the loop
        if product_operands(node) is not None:
            if normalized:
                found.add(node)
            continue
        if node.target in NORMALIZING:
            normalized = True
        elif node.target not in TRANSPARENT:
            continue
        for source in node.all_input_nodes:
            if (source, normalized) not in seen:
                seen.add((source, normalized))
                queue.append((source, normalized))
    return found


def _state_above(node: Node) -> Node:
    """Return the node that `node` is derived from by changes of layout and scale only."""
    while node.target in LAYOUT or (node.target in SCALING and not isinstance(node.args[1], Node)):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node
