"""Reuse replaces a site by an input; the nodes that computed its value are then dead, and removed."""

from __future__ import annotations

import torch

from tests.passes.tiny_denoiser import tiny_capture, tiny_denoiser
from tgate_compile.passes.graphs import copy_graph
from tgate_compile.passes.specialize import cache_input_name, remove_dead, reuse


def _placeholders(graph_module: torch.fx.GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]


def test_one_input_per_site_after_the_others() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    before = _placeholders(graph_module)
    assert reuse(graph_module, captured.sites).changes == 2
    assert _placeholders(graph_module) == [*before, "cache_cross_blocks_0_attn2", "cache_cross_blocks_1_attn2"]
    nodes = {node.name: node for node in graph_module.graph.nodes}
    assert all(not nodes[site.node].users for site in captured.sites)
    assert all(nodes[cache_input_name(site)].meta["val"].shape == site.shape for site in captured.sites)


def test_only_the_sites_given() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    assert reuse(graph_module, captured.sites[:1]).changes == 1
    nodes = {node.name: node for node in graph_module.graph.nodes}
    assert nodes[captured.sites[1].node].users


def test_dead_attention_goes_with_its_norm_its_dropout_its_weights_and_the_text() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    reuse(graph_module, captured.sites)
    assert remove_dead(graph_module).changes > 0
    left = _placeholders(graph_module)
    assert "text" not in left
    assert "return_dict" not in left
    assert not [name for name in left if "attn2" in name and name.startswith("p_")]
    assert not [name for name in left if "norm2" in name]
    assert [name for name in left if "attn1" in name and name.startswith("p_")]
    targets = [node.target for node in graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == 2


def test_removing_again_changes_nothing() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    reuse(graph_module, captured.sites)
    remove_dead(graph_module)
    assert remove_dead(graph_module).changes == 0


def test_a_graph_without_dead_code_keeps_its_operators() -> None:
    captured = tiny_capture(tiny_denoiser())
    graph_module = copy_graph(captured.program.graph_module)
    operators = [n.name for n in graph_module.graph.nodes if n.op == "call_function" and n.users]
    remove_dead(graph_module)
    assert [n.name for n in graph_module.graph.nodes if n.op == "call_function"] == operators
