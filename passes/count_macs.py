"""Count the multiply-accumulates of a graph from the shapes of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.graphs import operand, shape_of

aten = torch.ops.aten

LINEAR = {aten.linear.default}
CONVOLUTION = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.convolution.default,
}
# The position of the left operand: its number of elements times the result's last dimension is the count.
PRODUCTS = {
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one call.

    Attributes:
        layers: the number in linear and convolution layers, as in the paper's tables.
        attention: the number in the other matrix products, those of attention: queries by keys, weights by values.
    """

    layers: int
    attention: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.layers + self.attention


def count_macs(graph: torch.fx.Graph) -> Macs:
    """Return the multiply-accumulates of one run of `graph`, whose nodes carry fake tensors.

    Free sizes count with their values in the captured call. Operators whose sizes depend on data, such as the number of
    tokens that a mask leaves, are not counted.
    """
    layers = attention = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in LINEAR:
            layers += prod(_sizes(node)) * _sizes(operand(node, 1))[-1]
        elif node.target in CONVOLUTION:
            layers += prod(_sizes(node)) * prod(_sizes(operand(node, 1))[1:])
        elif node.target in FUSED:
            query, key, value = (_sizes(operand(node, position)) for position in range(3))
            attention += prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        elif node.target in PRODUCTS:
            attention += prod(_sizes(operand(node, PRODUCTS[node.target]))) * _sizes(node)[-1]
    return Macs(layers, attention)


def _sizes(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple((size.node.hint or 0) if isinstance(size, torch.SymInt) else size for size in shape_of(node))
