"""Remove what nothing uses any more."""

from __future__ import annotations

import torch
from torch.fx import Node

from tgate_compile.passes._result import PassResult


def remove_dead(graph_module: torch.fx.GraphModule) -> PassResult:
    """Remove the nodes that no output needs, then the inputs and parameters that no node uses."""
    graph = graph_module.graph
    before = len(graph.nodes)
    # By default fx keeps "impure" nodes, to which it counts dropout and assertions; diffusers' output
    # projections end in a dropout, so that by default nothing at all would be removed.
    graph.eliminate_dead_code(is_impure_node=_is_interface)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    return PassResult(before - len(graph.nodes))


def _is_interface(node: Node) -> bool:
    return node.op in ("placeholder", "output")
