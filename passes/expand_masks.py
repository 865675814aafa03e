"""Give attention masks a row for each query."""

from __future__ import annotations

import torch
from torch.fx import Node

from tgate_compile.passes._result import PassResult
from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.operands import operand, shape_of

aten = torch.ops.aten


def expand_masks(graph_module: torch.fx.GraphModule) -> PassResult:
    """Expand the masks of fused attentions to [..., queries, keys], where one row stands for all queries.

    torch broadcasts such a row. ONNX's Attention says so too, but ONNX Runtime's CPU kernel refuses it.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None or shape_of(mask)[-2] != 1 or shape_of(operand(node, 0))[-2] == 1:
            continue
        query = operand(node, 0)
        queries = shape_of(query)[-2]
        with graph.inserting_before(node):
            size: Node | int = queries
            if isinstance(queries, torch.SymInt):
                size = graph.call_function(aten.sym_size.int, (query, len(shape_of(query)) - 2))
                size.meta["val"] = queries
            kept = [-1] * (len(shape_of(mask)) - 2)
            expanded = graph.call_function(aten.expand.default, (mask, [*kept, size, -1]))
        fake = mask.meta["val"]
        with fake.fake_mode:
            expanded.meta["val"] = fake.expand([*kept, queries, -1])
        node.replace_input_with(mask, expanded)
        count += 1
    return PassResult(count)


def _mask(node: Node) -> Node | None:
    if node.target not in FUSED:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None
