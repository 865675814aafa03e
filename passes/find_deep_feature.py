"""Find the feature at which DeepCache cuts a UNet: what comes up from its deep part into one of its up layers."""

from __future__ import annotations

import torch
from torch.fx import Node

from tgate_compile._errors import UnsupportedModelError
from tgate_compile._graphs import Site
from tgate_compile.passes.module_region import is_inside

aten = torch.ops.aten

MSG_NO_FEATURE = (
    "Cannot find where {layer!r} joins the feature from below with its skip connection, so that DeepCache cannot be "
    "used. Please report the model class."
)


def find_deep_feature(graph_module: torch.fx.GraphModule, layer: str) -> Site:
    """The deep feature that enters up layer `layer`, a module path; the graph is left alone.

    A UNet's up layer takes cat([feature from below, skip connection]); the feature is its first operand. Replaced by
    a cached one, all of the layers below are dead: nothing says which these are, they simply are not needed any more.
    Source: DeepCache, arXiv 2312.00858, section 3.2.

    Raises:
        UnsupportedModelError: there is no such concatenation, or several.
    """
    joins = {
        source
        for node in graph_module.graph.nodes
        if is_inside(node, layer)
        for source in node.all_input_nodes
        if source.target is aten.cat.default and not is_inside(source, layer)
    }
    if len(joins) != 1:
        raise UnsupportedModelError(MSG_NO_FEATURE.format(layer=layer))
    feature = _joined(joins.pop())[0]
    value = feature.meta["val"]
    return Site("deep", layer, feature.name, tuple(value.shape), value.dtype, value.dtype)


def _joined(cat: Node) -> list[Node]:
    tensors = cat.args[0]
    assert isinstance(tensors, (list, tuple))
    return [tensor for tensor in tensors if isinstance(tensor, Node)]
