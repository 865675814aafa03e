"""Graph inputs are marked as contiguous, whatever the strides in the captured call."""

from __future__ import annotations

import pytest
import torch

from tgate_compile.passes.legalize import contiguous_inputs


class _Sum(torch.nn.Module):
    def forward(self, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return value + other


def strides(graph_module: torch.fx.GraphModule) -> list[tuple[int, ...]]:
    return [node.meta["val"].stride() for node in graph_module.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize(
    ("value", "before"),
    [
        (torch.tensor(5.0).expand(2)[:1], (0,)),  # one timestep, expanded to all images, for one image
        (torch.ones(3).expand(2, 3), (0, 1)),
        (torch.ones(3, 2).t(), (1, 2)),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
    ],
)
def test_other_strides(value: torch.Tensor, before: tuple[int, ...]) -> None:
    graph_module = torch.export.export(_Sum(), (value, value), strict=False).graph_module
    assert strides(graph_module) == [before] * 2
    expected = torch.empty(value.shape).stride()
    assert contiguous_inputs(graph_module, ["value"]).changes == 1
    assert strides(graph_module) == [expected, before]
    assert contiguous_inputs(graph_module, ["value", "other"]).changes == 1
    assert contiguous_inputs(graph_module, ["value", "other"]).changes == 0
    graph_module.graph.lint()
    fake = graph_module.graph.find_nodes(op="placeholder")[0].meta["val"]
    assert (fake.shape, fake.dtype, fake.device) == (value.shape, value.dtype, value.device)


def test_c_order() -> None:
    graph_module = torch.export.export(_Sum(), (torch.ones(2, 3), torch.ones(3)), strict=False).graph_module
    assert contiguous_inputs(graph_module, ["value", "other"]).changes == 0
