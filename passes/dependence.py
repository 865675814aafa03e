"""Which values of a graph depend on given inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def depends_on(graph: torch.fx.Graph, roots: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes of `graph` whose value depends on one of `roots` (these included)."""
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return dependent
