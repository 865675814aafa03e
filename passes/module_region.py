"""Which module of the model a node was traced in."""

from __future__ import annotations

from torch.fx import Node


def innermost_call(node: Node) -> tuple[str, str]:
    """The innermost call of a module that `node` was traced in, and the module's path; both are "" outside of any.

    A module that is called several times has several calls and one path.
    """
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    call, (path, _) = list(stack.items())[-1]
    return str(call), str(path)


def is_in_call(node: Node, call: str) -> bool:
    """Whether `node` was traced in this call of a module, or in one below it."""
    return call in node.meta.get("nn_module_stack", {})


def is_inside(node: Node, path: str) -> bool:
    """Whether `node` was traced in the module at `path`, or in one below it."""
    return any(entry[0] == path for entry in node.meta.get("nn_module_stack", {}).values())
