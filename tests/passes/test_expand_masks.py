"""A mask with one row for all queries gets a row for each."""

from __future__ import annotations

import torch

from tgate_compile.passes.legalize import expand_masks

QUERY = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
KEY = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(1))


class _Attention(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)


def _expanded(mask: torch.Tensor) -> tuple[int, torch.fx.GraphModule]:
    graph_module = torch.export.export(_Attention(), (QUERY, KEY, mask), strict=False).graph_module
    changes = expand_masks(graph_module).changes
    graph_module.graph.lint()
    graph_module.recompile()
    return changes, graph_module


def test_one_row_becomes_a_row_for_each_query() -> None:
    mask = torch.zeros(2, 3, 1, 6)
    mask[..., 4:] = -10000.0
    changes, graph_module = _expanded(mask)
    assert changes == 1
    (expand,) = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.expand.default]
    assert expand.meta["val"].shape == (2, 3, 5, 6)
    (result,) = graph_module(QUERY, KEY, mask)
    assert torch.equal(result, _Attention()(QUERY, KEY, mask))


def test_a_full_mask_is_left_alone() -> None:
    changes, _ = _expanded(torch.zeros(2, 3, 5, 6))
    assert changes == 0
