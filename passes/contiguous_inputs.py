"""Have a graph know its inputs in C order."""

from __future__ import annotations

from collections.abc import Collection

import torch

from tgate_compile.passes._result import PassResult


def contiguous_inputs(graph_module: torch.fx.GraphModule, names: Collection[str]) -> PassResult:
    """Say of the inputs `names` that they lie in C order, for runtimes that take nothing else.

    A call may have been captured with others: a pipeline that expands one timestep for all images has strides of 0,
    which stay even where there is one image, and count as C order for `contiguous`. Only what is known of the inputs is
    changed: what is known of the values that are made of them is as it was, until the graph is traced again.
    """
    count = 0
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        fake = node.meta["val"]
        with fake.fake_mode:
            in_order = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        if in_order.stride() != fake.stride():
            node.meta["val"] = in_order
            count += 1
    return PassResult(count)
