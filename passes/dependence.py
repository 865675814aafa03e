"""Which values of a graph depend on given inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

aten = torch.ops.aten

# Take of their second operand, or of their only one, no more than its dtype or shape.
_AS = {aten.type_as.default, aten.view_as.default, aten.expand_as.default, aten.reshape_as.default}
_LIKE = {
    aten.empty_like.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
}


def depends_on(
    graph: torch.fx.Graph, roots: Iterable[torch.fx.Node], *, cut: Collection[torch.fx.Node] = ()
) -> set[torch.fx.Node]:
    """The nodes of `graph` whose value depends on that of one of `roots` (these included).

    What a node depends on only through the nodes of `cut` does not count. Neither do sizes and dtypes: in a graph with
    free sizes even the text's keys are reshaped by the latents' batch.
    """
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in value_inputs(node)) and not _is_size(node) and node not in cut:
            dependent.add(node)
    return dependent


def value_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes whose values `node` uses, and not their shape, dtype or device alone."""
    if node.target in _LIKE:
        return []
    return node.all_input_nodes[:1] if node.target in _AS else node.all_input_nodes


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
