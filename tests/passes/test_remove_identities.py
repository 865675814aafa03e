"""Operators that do nothing are removed; others stay."""

from __future__ import annotations

import torch

from tgate_compile.passes.specialize import remove_dead, remove_identities

aten = torch.ops.aten


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.dropout(sample.squeeze(1)) + sample.squeeze(0).sum()


def _graph(model: torch.nn.Module) -> torch.fx.GraphModule:
    return torch.export.export(model, (torch.ones(1, 3, 2),), strict=False).graph_module


def _targets(graph_module: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_identities_are_removed() -> None:
    graph_module = _graph(_Model().eval())
    before = graph_module(torch.ones(1, 3, 2))
    assert remove_identities(graph_module).changes == 2
    remove_dead(graph_module)
    graph_module.recompile()
    assert aten.dropout.default not in _targets(graph_module)
    (squeeze,) = [node for node in graph_module.graph.nodes if node.target is aten.squeeze.dim]
    assert squeeze.args[1] == 0
    assert torch.equal(graph_module(torch.ones(1, 3, 2))[0], before[0])


def test_dropout_in_training_stays() -> None:
    graph_module = _graph(_Model().train())
    remove_identities(graph_module)
    assert aten.dropout.default in _targets(graph_module)
