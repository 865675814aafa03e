"""Typed access to what a node takes, does, and is known to produce."""

from __future__ import annotations

import torch
from torch.fx import Node


def operand(node: Node, position: int) -> Node:
    """The node that is positional argument `position` of `node`."""
    value = node.args[position]
    assert isinstance(value, Node), f"{node.format_node()}: argument {position} is no node"
    return value


def argument(node: Node, position: int, name: str, default: object = None) -> object:
    """What `node` is given as argument `name`, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def outputs_of(graph: torch.fx.Graph) -> tuple[Node, ...]:
    """The values that `graph` returns: one flat tuple."""
    values = graph.output_node().args[0]
    assert isinstance(values, (tuple, list)), "the graph's output is not flat"
    return tuple(value for value in values if isinstance(value, Node))


def shape_of(node: Node) -> torch.Size:
    """The shape of the value that `node` produces."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def is_mutable(node: Node) -> bool:
    """Whether `node` writes into one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
