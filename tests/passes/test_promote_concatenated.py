"""Concatenated tensors are promoted to one dtype, as ONNX requires."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tgate_compile.passes.legalize import promote_concatenated

HALF = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).half()
SINGLE = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class _Join(torch.nn.Module):
    def __init__(self, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.join([first, second, first], dim=-1)


@pytest.mark.parametrize("join", [torch.cat, torch.concat, torch.concatenate])
def test_the_narrower_is_cast(join: Callable[..., torch.Tensor]) -> None:
    graph_module = torch.export.export(_Join(join), (HALF, SINGLE), strict=False).graph_module
    assert promote_concatenated(graph_module).changes == 1
    graph_module.graph.lint()
    graph_module.recompile()
    casts = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert [node.meta["val"].dtype for node in casts] == [torch.float32]
    (result,) = graph_module(HALF, SINGLE)
    assert torch.equal(result, _Join(join)(HALF, SINGLE))


def test_one_dtype_is_left_alone() -> None:
    graph_module = torch.export.export(_Join(torch.cat), (SINGLE, SINGLE), strict=False).graph_module
    assert promote_concatenated(graph_module).changes == 0
