"""The short form of `benchmarks/soak.py`: mixed calls, each compared with a fresh pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.soak import Soak, quiet
from tgate_compile.pipeline.caches import Caches

CALLS = 50


@pytest.mark.heavy
def test_mixed_calls() -> None:
    soak = Soak(0, short=True)
    with quiet():
        problem = soak.run(CALLS)
    assert problem is None
    # A soak that does nothing would also pass.
    assert soak.done["calls"] >= CALLS
    for name in ("gated", "ungated", "event preview", "event raise", "event interrupt", "event threads", "event again"):
        assert soak.done[name], name
    assert soak.worst < 1e-5


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the cached values are off by a thousandth."""
    merge = Caches.put

    def put(self: Caches, key: Any, value: torch.Tensor, *more: Any, **named: Any) -> None:
        merge(self, key, value * 1.001, *more, **named)

    monkeypatch.setattr(Caches, "put", put)
    with quiet():
        problem = Soak(0, short=True).run(CALLS)
    assert problem is not None
    assert "from the pipeline with hooks" in problem["problem"]
    assert "from the pipeline with hooks" in problem["alone"]
