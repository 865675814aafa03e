"""Tests that share traced graphs get the same results as with separate graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tgate_compile
from tests import sharing
from tests.comparing import assert_differ
from tests.tiny_pipelines import run, stable_diffusion


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Collect the traced models in order, and ignore graphs from earlier tests."""
    models: list[torch.nn.Module] = []
    export = torch.export.export

    def noted(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        models.append(module)
        return export(module, *args, **options)

    monkeypatch.setattr(torch.export, "export", noted)
    monkeypatch.setattr(sharing, "_PROGRAMS", {})
    return models


def least(factor: float = 1.0) -> Any:
    pipe = stable_diffusion(layout="least")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(factor)
    return pipe


def gated(pipe: Any) -> torch.Tensor:
    return run(tgate_compile.optimize(pipe, 2, backend="eager"), steps=4)


def test_equal_models_are_traced_once_and_keep_their_weights(traced: list[torch.nn.Module]) -> None:
    expected = [gated(least()), gated(least(1.5))]
    assert_differ(*expected)
    for_one = len(traced) // 2
    traced.clear()
    with sharing.shared_programs():
        assert torch.equal(gated(least()), expected[0])
        other = least(1.5)
        assert torch.equal(gated(other), expected[1])
        assert len(traced) == for_one
        with torch.no_grad():
            other.unet.conv_in.weight.div_(1.5)
        assert_differ(run(other, steps=4), expected[1])
    gated(least())
    assert len(traced) == 2 * for_one


def test_other_models_are_traced_anew(traced: list[torch.nn.Module]) -> None:
    def changed() -> Any:
        pipe = least()
        pipe.unet.down_blocks[0].resnets[0].output_scale_factor = 2.0  # a constant in the graph
        return pipe

    expected = gated(changed())
    traced.clear()
    with sharing.shared_programs():
        assert_differ(gated(least()), expected)
        before = len(traced)
        assert torch.equal(gated(changed()), expected)
        assert len(traced) == 2 * before
