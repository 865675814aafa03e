"""Replace the values at sites by inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tgate_compile._graphs import Site
from tgate_compile.passes._result import PassResult


def cache_name(site: Site) -> str:
    """The name of the input that stands for `site`: an identifier, since it becomes a Python argument."""
    return f"cache_{site.kind}_" + site.name.replace(".", "_")


def reuse(graph_module: torch.fx.GraphModule, sites: Iterable[Site]) -> PassResult:
    """Give `graph_module` one more input for each site, after the others, used wherever the value was.

    It has the site's `cache_dtype`, and is cast to the value's own where that differs.

    What computed the value is left in place, dead, for `remove_dead`.
    """
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    count = 0
    for site in sites:
        value = nodes[site.node]
        with graph.inserting_after(last_input):
            cached = graph.placeholder(cache_name(site))
        fake = value.meta["val"]
        with fake.fake_mode:
            cached.meta["val"] = fake if site.cache_dtype == site.dtype else fake.to(site.cache_dtype)
        last_input = replacement = cached
        if site.cache_dtype != site.dtype:
            with graph.inserting_before(value):
                replacement = graph.call_function(torch.ops.aten.to.dtype, (cached, site.dtype))
            replacement.meta["val"] = fake
        value.replace_all_uses_with(replacement)
        count += 1
    return PassResult(count)
