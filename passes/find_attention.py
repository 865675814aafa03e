"""Find the attention sites of a captured denoiser, by data flow."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch.fx import Node

from tgate_compile._errors import UnsupportedModelError
from tgate_compile._graphs import Site
from tgate_compile._schedule import Kind
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.dependence import depends_on
from tgate_compile.passes.module_region import innermost_module, is_inside
from tgate_compile.passes.operands import operand

logger = logging.getLogger(__name__)
aten = torch.ops.aten

MSG_SEVERAL_OUTPUTS = (
    "Cannot cache the attention {module!r}: {count} of its values are used outside of it ({values}), "
    "and exactly one was expected. Please report the model class."
)


def find_attention(
    graph_module: torch.fx.GraphModule, latents: Node, kinds: Collection[Kind] = ("cross", "self")
) -> list[Site]:
    """The attention sites of `graph_module` of these kinds, in graph order; the graph is left alone.

    An attention is a cross-attention when its query depends on `latents` and its key and value do not, and a
    self-attention when all three do. Joint attention (SD3, Flux) has keys of both kinds in one tensor, and looks like
    the latter; a model that has nothing else is refused where it is captured.
    The site's value is what the enclosing module returns, after its output projection and dropout and before
    its residual connection and rescaling, where it has these (diffusers' `Attention`): what the paper caches.

    Raises:
        UnsupportedModelError: several values leave one such module.
    """
    graph = graph_module.graph
    dependent = depends_on(graph, [latents])
    sites: dict[Node, Site] = {}
    for core in attention_cores(graph):
        if core.query not in dependent or (core.key in dependent) != (core.value in dependent):
            continue
        kind: Kind = "self" if core.key in dependent else "cross"
        if kind not in kinds:
            continue
        path = innermost_module(core.node)
        outlet = _before_residual_and_rescale(_outlet(core.node, path), path)
        if outlet not in sites:
            value = outlet.meta["val"]
            sites[outlet] = Site(
                kind, _without_processor(path), outlet.name, tuple(value.shape), value.dtype, value.dtype
            )
    logger.debug("found %d attention sites", len(sites))
    return list(sites.values())


def _without_processor(path: str) -> str:
    # Some attention processors (IP-Adapter's) are modules too; the site is named after the attention.
    return path.removesuffix(".processor")


def _outlet(core: Node, path: str) -> Node:
    """The one value that module `path` makes of its attention `core` and that is used outside of it."""
    made = [core]
    for node in made:  # which grows
        made += [user for user in node.users if is_inside(user, path) and user not in made]
    leaving = [node for node in made if any(not is_inside(user, path) for user in node.users)]
    if len(leaving) != 1:
        values = ", ".join(node.name for node in leaving)
        raise UnsupportedModelError(MSG_SEVERAL_OUTPUTS.format(module=path, count=len(leaving), values=values))
    return leaving[0]


def _before_residual_and_rescale(node: Node, path: str) -> Node:
    if node.target is aten.div.Tensor and not isinstance(node.args[1], Node):
        return _before_residual_and_rescale(operand(node, 0), path)
    if node.target is aten.add.Tensor:
        left, right = node.args[:2]
        if isinstance(left, Node) and isinstance(right, Node) and is_inside(left, path) and not is_inside(right, path):
            return left
    return node
