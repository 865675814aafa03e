"""Which module of the model a node was traced in."""

from __future__ import annotations

from torch.fx import Node


def innermost_module(node: Node) -> str:
    """The path of the innermost module that `node` was traced in."""
    path: str = list(node.meta["nn_module_stack"].values())[-1][0]
    return path


def is_inside(node: Node, path: str) -> bool:
    """Whether `node` was traced in the module at `path`, or in one below it."""
    return any(entry[0] == path for entry in node.meta.get("nn_module_stack", {}).values())
