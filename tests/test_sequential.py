"""Sequential mode: the same numbers with only one graph in memory at a time."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import tgate_compile
from tests.exported import GATE, STEPS, exported, plain
from tests.programs import noise, program
from tests.tiny_pipelines import PROMPT, run
from tgate_compile import ConfigurationError
from tgate_compile.bundle.plan_rows import openings
from tgate_compile.bundle.store import BundleStore
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.runtime import BundlePipeline


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return our warnings, without torch's."""
    return [record for record in caplog.records if record.name == "tgate_compile.bundle.plan_rows"]


def store_of(pipe: Any) -> BundleStore:
    store = required_state_of(pipe).hook.store
    assert isinstance(store, BundleStore)
    return store


def opened_at_each_step(pipe: Any) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
    """Return the latents, and the graphs that were open after each step."""
    seen: list[tuple[str, ...]] = []

    def after(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(store_of(own).open_graphs)
        return values

    return run(pipe, steps=STEPS, callback_on_step_end=after), seen


def test_a_pipeline_has_one_graph_open() -> None:
    expected, both = opened_at_each_step(tgate_compile.load(plain(), exported()))
    assert both[-1] == ("full-prelude", "full-table", "full", "pruned-table", "pruned")

    pipe = tgate_compile.load(plain(), exported(), sequential=True)
    for _ in range(2):  # the full graph is opened again
        latents, seen = opened_at_each_step(pipe)
        assert torch.equal(latents, expected)
        assert seen == [("full",)] * GATE + [("pruned",)] * (STEPS - GATE)


def test_the_graph_that_is_left_is_freed() -> None:
    pipe = tgate_compile.load(plain(), exported(), sequential=True)
    run(pipe, steps=GATE)  # only the full graph
    store = store_of(pipe)
    assert store.open_graphs == ("full",)
    session = weakref.ref(next(iter(store._sessions.values())))
    run(pipe, steps=STEPS)
    gc.collect()
    assert session() is None


@pytest.mark.heavy
@pytest.mark.parametrize("schedule", [{"dynamic": True}, {"cache_dtype": torch.float8_e4m3fn}], ids=["fp32", "fp8"])
def test_a_program_has_one_graph_open(schedule: dict[str, Any]) -> None:
    latents = noise()
    expected = BundlePipeline(program(**schedule), threads=1)(PROMPT, latents=latents, output="numpy")
    pipe = BundlePipeline(program(**schedule), threads=1, sequential=True)
    seen = []
    for _ in range(2):
        seen.clear()
        image = pipe(PROMPT, latents=latents, output="numpy", callback=lambda step: seen.append(pipe.open_graphs))
        assert np.array_equal(image, expected)
        assert seen[0] == ("full",)
        assert seen[-1] == ("pruned",)
        assert all(len(graphs) == 1 for graphs in seen)
        assert pipe.open_graphs == ()
        assert pipe._prompts is None
        assert pipe._decoder is None


@pytest.mark.heavy
def test_a_program_frees_the_graph_that_is_left() -> None:
    """ONNX Runtime's values keep their session alive, and caches are such values."""
    pipe = BundlePipeline(program(dynamic=True), threads=1, sequential=True)
    seen: list[weakref.ref[Any]] = []

    def after(step: Any) -> None:
        gc.collect()
        assert [session() for session in seen if pipe.open_graphs == ("pruned",)] in ([], [None])
        if pipe.open_graphs == ("full",) and not seen:
            (session,) = pipe._graphs._sessions.values()
            seen.append(weakref.ref(session._session._sess))

    pipe(PROMPT, latents=noise(), output="numpy", callback=after)
    assert len(seen) == 1


@pytest.mark.heavy
def test_schedules_that_alternate(caplog: pytest.LogCaptureFixture) -> None:
    schedule: dict[str, Any] = {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0}
    folder = program(dynamic=False, **schedule)
    latents = noise()
    expected = BundlePipeline(folder, threads=1)(PROMPT, latents=latents, output="numpy")
    assert not warnings_of(caplog)
    pipe = BundlePipeline(folder, threads=1, sequential=True)
    times = openings([step.graph for step in pipe.manifest.example.steps])
    (record,) = warnings_of(caplog)
    assert record.levelno == logging.WARNING
    assert f"opens a graph {times} times" in record.getMessage()
    assert times > len({step.graph for step in pipe.manifest.example.steps})
    seen: list[tuple[str, ...]] = []
    image = pipe(PROMPT, latents=latents, output="numpy", callback=lambda step: seen.append(pipe.open_graphs))
    assert np.array_equal(image, expected)
    assert {len(graphs) for graphs in seen} == {1}


def test_how_often_graphs_are_opened() -> None:
    assert openings([]) == 0
    assert openings(["full", "full", "pruned"]) == 2
    assert openings(["full", "shallow", "full", "pruned"]) == 4


def test_invalid_values() -> None:
    with pytest.raises(ConfigurationError, match="sequential must be True or False, but got 1"):
        tgate_compile.load(plain(), exported(), sequential=1)  # type: ignore[arg-type]
