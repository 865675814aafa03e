"""Fused operators are decomposed into products and arithmetic with the same results, or left unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.comparing import difference
from tgate_compile.passes.graphs import PassResult
from tgate_compile.passes.legalize import unfuse_attention, unfuse_gelu, unfuse_halves, unfuse_norms

Pass = Callable[[torch.fx.GraphModule], PassResult]

aten = torch.ops.aten


class _Calls(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rewritten(change: Pass, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> set[object]:
    """Return the operators of the graph of `function` after `change`; check for equal results and a single change."""
    program = torch.export.export(_Calls(function), inputs, strict=False)
    graph_module = program.graph_module
    assert change(graph_module).changes > 0
    assert change(graph_module).changes == 0
    graph_module.graph.lint()
    graph_module.recompile()
    expected = function(*inputs)
    (result,) = graph_module(*inputs)
    assert result.shape == expected.shape
    assert difference(result, expected) < 1e-5
    for node in graph_module.graph.nodes:
        assert node.op == "output" or node.meta["val"] is not None
    return {node.target for node in graph_module.graph.nodes if node.op == "call_function"}


def untouched(change: Pass, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    assert change(torch.export.export(_Calls(function), inputs, strict=False).graph_module).changes == 0


attention = functional.scaled_dot_product_attention
QUERY, KEY, VALUE = random(2, 3, 5, 4), random(2, 3, 6, 4), random(2, 3, 6, 7)


def test_attention() -> None:
    assert aten.bmm.default in rewritten(unfuse_attention, attention, QUERY, KEY, VALUE)
    mask = torch.zeros(2, 1, 1, 6)
    mask[..., 4:] = -10000.0
    rewritten(unfuse_attention, lambda *given: attention(*given[:3], attn_mask=given[3]), QUERY, KEY, VALUE, mask)
    rewritten(unfuse_attention, lambda *given: attention(*given, scale=0.3), QUERY, KEY, VALUE)


def test_attention_that_is_left_alone() -> None:
    mask = torch.ones(5, 6, dtype=torch.bool)
    untouched(unfuse_attention, lambda *given: attention(*given[:3], attn_mask=given[3]), QUERY, KEY, VALUE, mask)
    untouched(unfuse_attention, lambda *given: attention(*given, is_causal=True), QUERY, QUERY, QUERY)
    untouched(
        unfuse_attention,
        lambda *given: attention(*given, enable_gqa=True),
        QUERY,
        random(2, 1, 6, 4),
        random(2, 1, 6, 7),
    )


def test_gelu() -> None:
    left = rewritten(unfuse_gelu, lambda given: functional.gelu(given, approximate="tanh"), 5 * random(3, 40))
    assert aten.gelu.default not in left
    untouched(unfuse_gelu, functional.gelu, random(3, 4))
    untouched(unfuse_gelu, lambda given: functional.gelu(given, approximate="tanh"), random(3, 4).half())


def test_group_norm() -> None:
    value, weight, bias = 3 + 2 * random(2, 6, 4, 5), random(6), random(6)
    left = rewritten(unfuse_norms, lambda *given: functional.group_norm(given[0], 3, *given[1:]), value, weight, bias)
    assert aten.group_norm.default not in left
    rewritten(unfuse_norms, lambda given: functional.group_norm(given, 2, eps=0.1), value)


def test_layer_norm() -> None:
    value, weight, bias = 3 + 2 * random(2, 5, 8), random(8), random(8)
    left = rewritten(unfuse_norms, lambda *given: functional.layer_norm(given[0], [8], *given[1:]), value, weight, bias)
    assert aten.layer_norm.default not in left
    rewritten(unfuse_norms, lambda given: functional.layer_norm(given, [5, 8]), value)
    untouched(unfuse_norms, lambda given: functional.layer_norm(given, [8]), value.half())


@pytest.mark.parametrize("parts", [2, 3])
def test_chunks(parts: int) -> None:
    left = rewritten(
        unfuse_halves, lambda given: torch.stack([part.sum(-1) for part in given.chunk(parts, -1)]), random(2, 3, 8)
    )
    assert aten.chunk.default not in left


def test_means() -> None:
    left = rewritten(unfuse_halves, lambda given: given.unflatten(0, [2, -1]).mean(0), random(6, 3, 4))
    assert aten.mean.dim not in left
    untouched(unfuse_halves, lambda given: given.mean(0), random(3, 4))
    untouched(unfuse_halves, lambda given: given.mean(1), random(2, 2, 4))
