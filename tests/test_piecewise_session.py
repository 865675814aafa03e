"""A graph that is run piece by piece gives the same results as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.comparing import difference
from tests.exported import exported
from tgate_compile import BackendError
from tgate_compile.bundle.read import read_bundle
from tgate_compile.bundle.read_manifest import inputs_of, shape_at
from tgate_compile.exports.onnx import open as piecewise_session
from tgate_compile.exports.onnx.open import OnnxSession, PiecewiseSession

SIZES = {"b": 2, "h": 6, "w": 8}


def inputs_for(graph: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape_at(spec.shape, SIZES), generator=generator) for spec in inputs_of(graph)]


@pytest.mark.parametrize("name", ["full", "pruned"])
def test_pieces_and_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_session, "PIECE", 10_000)
    graph = read_bundle(exported()).manifest.graphs[name]
    path, inputs = exported() / graph.file, inputs_for(graph)
    session = PiecewiseSession(graph, path)
    assert len(session._pieces) > 5
    whole = OnnxSession(graph, path, torch.device("cpu"), {}).run(inputs)
    pieces = session.run(inputs)
    assert len(pieces) == len(whole) == len(graph.outputs) + len(graph.cache_outputs)
    for one, other in zip(pieces, whole, strict=True):
        assert difference(one, other) < 1e-5


def test_a_file_that_onnx_runtime_does_not_take(tmp_path: Any) -> None:
    graph = read_bundle(exported()).manifest.graphs["full"]
    (tmp_path / "full.onnx").write_bytes(b"nothing")
    with pytest.raises(BackendError, match="could not run the full graph"):
        PiecewiseSession(graph, tmp_path / "full.onnx")
