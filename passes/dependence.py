"""Which values of a graph depend on given inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch


def depends_on(
    graph: torch.fx.Graph, roots: Iterable[torch.fx.Node], *, cut: Collection[torch.fx.Node] = ()
) -> set[torch.fx.Node]:
    """The nodes of `graph` whose value depends on that of one of `roots` (these included).

    What a node depends on only through the nodes of `cut` does not count. Neither do sizes: in a graph with free sizes
    even the text's keys are reshaped by the latents' batch.
    """
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in node.all_input_nodes) and not _is_size(node) and node not in cut:
            dependent.add(node)
    return dependent


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
