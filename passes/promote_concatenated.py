"""Give tensors that are concatenated one dtype."""

from __future__ import annotations

import torch

from tgate_compile.passes._result import PassResult

aten = torch.ops.aten

CONCATENATIONS = {aten.cat.default, aten.concat.default, aten.concatenate.default}


def promote_concatenated(graph_module: torch.fx.GraphModule) -> PassResult:
    """Cast the operands of each concatenation to its result's dtype, where they have another.

    torch promotes them by itself: SDXL joins its pooled text, in float16, with an embedding of sizes, in float32.
    ONNX's Concat does not.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target not in CONCATENATIONS:
            continue
        dtype = node.meta["val"].dtype
        for operand in node.all_input_nodes:
            fake = operand.meta["val"]
            if fake.dtype != dtype:
                with graph.inserting_before(node):
                    cast = graph.call_function(aten.to.dtype, (operand, dtype))
                with fake.fake_mode:
                    cast.meta["val"] = fake.to(dtype)
                node.replace_input_with(operand, cast)
                count += 1
    return PassResult(count)
