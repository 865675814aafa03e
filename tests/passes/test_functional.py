"""In-place operators are replaced in the graph if that is certain to be right; otherwise it is traced again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tgate_compile.passes import graphs
from tgate_compile.passes.graphs import functional, is_mutable


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.function(sample)


def _whole(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y + 1  # reads the first value
    y += x
    y.mul_(z)
    return y - z


def _returned(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).add_(1)


def _parts(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y[:, 0::2] = x[:, 1::2] * 3
    y[1][:2].add_(x[0, :2])
    return y.clone() + y[0]


def _view_before(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    view = y.t()
    y.add_(1)
    return view.sum(0) + y.sum()


def _maybe_the_operand(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    torch.dropout(y, 0.5, False).add_(1)  # without training, dropout returns its operand
    return y


def _another_dtype(x: torch.Tensor) -> torch.Tensor:
    y = x.half()
    y.add_(x + 0.3)
    return y * 2


def _of_parts_that_are_read(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y[0]
    part.add_(1)
    return y + part


@pytest.mark.parametrize(
    ("function", "again"),
    [
        (_whole, False),
        (_returned, False),
        (_parts, False),
        (_view_before, True),
        (_another_dtype, True),
        (_of_parts_that_are_read, True),
    ],
)
def test_the_results_are_those_of_the_module(
    function: Callable[[torch.Tensor], torch.Tensor], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    own = torch.export.ExportedProgram.run_decompositions

    def counted(self: torch.export.ExportedProgram, *args: object) -> torch.export.ExportedProgram:
        traced.append(self)
        return own(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    sample = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    module = _Module(function)
    program = torch.export.export(module, (sample,), strict=False)
    assert any(map(is_mutable, program.graph.nodes))
    result = functional(program)
    assert bool(traced) == again
    assert not any(map(is_mutable, result.graph.nodes))
    assert again or all("val" in node.meta for node in result.graph.nodes if node.op == "call_function")
    result.graph.lint()
    for given in (sample, sample - 2):
        assert torch.equal(result.module()(given), module(given))
    assert functional(result) is result


@pytest.mark.parametrize("function", [lambda x: x.add_(1) * 2, _maybe_the_operand], ids=["input", "dropout"])
def test_what_is_not_certain_is_left_to_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = torch.export.export(_Module(function), (torch.ones(2, 3),), strict=False).graph
    assert not graphs._write_to_own_tensors(graph, [node for node in graph.nodes if is_mutable(node)])
