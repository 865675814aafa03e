"""Copy a graph, and nothing that it refers to."""

from __future__ import annotations

import copy

import torch


def copy_graph(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`graph_module` with a graph of its own, to be changed; submodules and fake tensors are shared.

    The output of the copy is a flat tuple, as that of the graph must be.
    """
    graph = torch.fx.Graph()
    output = graph.graph_copy(graph_module.graph, val_map={})
    graph.output(tuple(output))  # type: ignore[arg-type]
    for node in graph.nodes:
        node.meta = copy.copy(node.meta)  # what a pass notes on a node is not to appear on the original's
    return torch.fx.GraphModule(graph_module, graph)
