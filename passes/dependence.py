"""Which values of a graph depend on given inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def depends_on(graph: torch.fx.Graph, roots: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes of `graph` whose value depends on that of one of `roots` (these included).

    Sizes do not count: in a graph with free sizes even the text's keys are reshaped by the latents' batch.
    """
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in node.all_input_nodes) and not _is_size(node):
            dependent.add(node)
    return dependent


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
