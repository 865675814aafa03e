"""Graphs that can be refitted get changed weights of the denoiser; with others the call is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import tgate_compile
from tests.exported import exported, plain
from tests.tiny_pipelines import add_lora, run
from tgate_compile import BundleError
from tgate_compile.bundle import store
from tgate_compile.bundle.formats import Session
from tgate_compile.bundle.weights import bit_sums
from tgate_compile.exports.onnx import save as onnx_graphs

#: The graphs of the bundle: two preludes or tables of the full graph, a table of the pruned one, and both steps.
GRAPHS = 5


class Following:
    """Runs a graph in ONNX Runtime and records the weights for refits; engines that can be refitted need a GPU."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.provider = session.provider
        self.given: list[torch.Tensor] = []

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._session.run(inputs)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.given.append(weights["conv_out.bias"].clone())


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Following]:
    """Collect the sessions that are opened from now on."""
    exported()
    opened: list[Following] = []
    open_graph = onnx_graphs.open_graph

    def follow(*arguments: Any) -> Following:
        opened.append(Following(open_graph(*arguments)))
        return opened[-1]

    monkeypatch.setattr(onnx_graphs, "open_graph", follow)
    return opened


def change(pipe: Any, by: float) -> torch.Tensor:
    pipe.unet.conv_out.bias.data += by
    return pipe.unet.conv_out.bias.detach().clone()


def test_graphs_follow_once_for_each_change(sessions: list[Following]) -> None:
    pipe = tgate_compile.load(plain(), exported())
    run(pipe)
    assert [session.given for session in sessions] == [[]] * GRAPHS
    first = change(pipe, 0.5)
    run(pipe)
    run(pipe)
    second = change(pipe, 0.25)
    run(pipe)
    for session in sessions:
        assert len(session.given) == 2
        assert torch.equal(session.given[0], first)
        assert torch.equal(session.given[1], second)


def test_graphs_follow_a_fused_lora(sessions: list[Following]) -> None:
    pipe = tgate_compile.load(plain(), exported())
    run(pipe)
    add_lora(pipe.unet)
    with pytest.raises(BundleError, match="have changed since"):
        run(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    run(pipe)
    assert [len(session.given) for session in sessions] == [1] * GRAPHS


def test_graphs_that_are_opened_later_follow_too(sessions: list[Following]) -> None:
    pipe = tgate_compile.load(plain(), exported())
    now = change(pipe, 0.5)
    run(pipe)
    assert [len(session.given) for session in sessions] == [1] * GRAPHS
    assert torch.equal(sessions[0].given[0], now)


def test_other_graphs_refuse_until_the_weights_are_back() -> None:
    pipe = tgate_compile.load(plain(), exported())
    expected = run(pipe)
    before = pipe.unet.conv_out.bias.detach().clone()
    change(pipe, 0.5)
    for _ in range(2):
        with pytest.raises(BundleError, match="have changed since"):
            run(pipe)
    pipe.unet.conv_out.bias.data.copy_(before)
    assert torch.equal(run(pipe), expected)


def test_weights_within_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a callback each step checks the weights, but reads all of them once per generation only."""
    pipe = tgate_compile.load(plain(), exported())
    read: list[torch.nn.Module] = []

    def counted(denoiser: torch.nn.Module) -> tuple[int, ...]:
        read.append(denoiser)
        return bit_sums(denoiser)

    monkeypatch.setattr(store, "bit_sums", counted)
    steps: list[int] = []

    def watching(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    def changing(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            change(pipe, 0.5)
        return watching(pipe, step, timestep, tensors)

    run(pipe, callback_on_step_end=watching)
    assert len(read) == 1
    assert len(steps) > 3
    steps.clear()
    with pytest.raises(BundleError, match="have changed since"):
        run(pipe, callback_on_step_end=changing)
    assert steps == [0, 1]
