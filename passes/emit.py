"""Make the values at sites outputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from tgate_compile._graphs import Emission
from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call
from tgate_compile.passes.operands import outputs_of

aten = torch.ops.aten


def emit(graph_module: torch.fx.GraphModule, emissions: Iterable[Emission]) -> PassResult:
    """Append the values at sites to the outputs, in the order of `emissions`.

    A merged one is the weighted mean of the guidance halves of [uncond; cond], batch B (arXiv 2404.02747, section
    3.2: equal weights), accumulated in fp32 at least. What is handed on has the site's `cache_dtype`.
    Its batch comes first, wherever the graph has it. `graph_module` is changed in place; its output is one flat tuple.
    """
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    output = graph.output_node()
    emitted = []
    for emission in emissions:
        value = nodes[emission.site.node]
        with graph.inserting_before(output):
            if emission.site.batch != 0:
                value = add_call(graph, aten.movedim.int, value, emission.site.batch, 0)
            handed_on = value if emission.anchor is None else _merged(graph, value, emission.anchor)
            emitted.append(_cast(graph, handed_on, emission))
    output.args = ((*outputs_of(graph), *emitted),)
    return PassResult(len(emitted))


def _merged(graph: torch.fx.Graph, value: Node, anchor: float) -> Node:
    # Not chunk(2): on a dynamic batch it exports as a sequence, which ONNX optimizers trip over.
    dtype = value.meta["val"].dtype
    accumulated = torch.promote_types(dtype, torch.float32)
    halves = add_call(graph, aten.unflatten.int, value, 0, [2, -1])
    if anchor == 0.5:
        mean = add_call(graph, aten.mean.dim, halves, [0], False, dtype=accumulated)
    else:
        exact = halves if dtype == accumulated else add_call(graph, aten.to.dtype, halves, accumulated)
        uncond, cond = (add_call(graph, aten.select.int, exact, 0, half) for half in (0, 1))
        weighted = add_call(graph, aten.mul.Tensor, uncond, 1.0 - anchor)
        mean = add_call(graph, aten.add.Tensor, weighted, cond, alpha=anchor)
    return mean


def _cast(graph: torch.fx.Graph, value: Node, emission: Emission) -> Node:
    target, limit = emission.site.cache_dtype, torch.finfo(emission.site.cache_dtype).max
    if value.meta["val"].dtype == target:
        return value
    within = emission.anchor is None or 0.0 <= emission.anchor <= 1.0
    if not within or limit < torch.finfo(emission.site.dtype).max:
        # fp8 and fp16 are narrow: what lies beyond becomes the largest number, not infinity.
        value = add_call(graph, aten.clamp.default, value, -limit, limit)
    return add_call(graph, aten.to.dtype, value, target)
