"""Replace the values at sites by inputs of the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from tgate_compile._graphs import Site
from tgate_compile.passes._result import PassResult
from tgate_compile.passes.add_call import add_call

aten = torch.ops.aten


def cache_name(site: Site) -> str:
    """The name of the input that stands for `site`: an identifier, since it becomes a Python argument."""
    return f"cache_{site.kind}_" + re.sub(r"\W", "_", site.name)


def reuse(graph_module: torch.fx.GraphModule, sites: Iterable[Site]) -> PassResult:
    """Give `graph_module` one more input for each site, after the others, used wherever the value was.

    It has the site's `cache_dtype` and the batch first; where the value's own dtype or layout differs, it is cast and
    moved.

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
        same = site.batch == 0 and site.cache_dtype == site.dtype
        with fake.fake_mode:
            cached.meta["val"] = fake if same else fake.movedim(site.batch, 0).to(site.cache_dtype)
        last_input = replacement = cached
        with graph.inserting_before(value):
            if site.cache_dtype != site.dtype:
                replacement = add_call(graph, aten.to.dtype, replacement, site.dtype)
            if site.batch != 0:
                replacement = add_call(graph, aten.movedim.int, replacement, 0, site.batch)
        value.replace_all_uses_with(replacement)
        count += 1
    return PassResult(count)
