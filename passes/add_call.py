"""Put a call of an operator into a graph, and know what it produces."""

from __future__ import annotations

import torch
from torch.fx import Node


def add_call(
    graph: torch.fx.Graph, target: torch._ops.OpOverload, source: Node, *args: object, **kwargs: object
) -> Node:
    """A new node, where `graph` inserts, that calls `target` on `source` and further arguments, nodes or not."""
    node = graph.call_function(target, (source, *args), kwargs)  # type: ignore[arg-type]
    fake = source.meta["val"]
    with fake.fake_mode:
        node.meta["val"] = target(fake, *(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)
    return node
