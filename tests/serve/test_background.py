"""Graphs for new sizes: prepared by a method of the engine, and captured in child processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import tgate_compile
from tests.comparing import assert_same
from tests.serve.requesting import HANGS, alone, at_once, batched, call_of, images, tiny
from tests.tiny_pipelines import stable_diffusion
from tgate_compile._cache import FOLDER_VARIABLE
from tgate_compile.serve import Engine, EngineClosedError, Progress
from tgate_compile.serve.background import Captures

pytestmark = pytest.mark.usefixtures("no_deadlock")

NEW = {"height": 16, "width": 32}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a disk cache of its own, so that there is something to capture."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def endless(progress: list[Progress]) -> dict[str, Any]:
    """Return a request that takes longer than a capture, and notes its steps."""
    return {"call": call_of(1, num_inference_steps=900), "on_step": progress.append}


def test_sizes_are_prepared_while_requests_run() -> None:
    pipe = tiny()
    expected = alone(pipe, call_of(2, **NEW))
    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="refuse") as engine:
        with pytest.raises(tgate_compile.UnsupportedCallError, match="warm_up"):
            images(engine.submit(call_of(2, **NEW)))
        steps: list[Progress] = []
        running = engine.submit(**endless(steps))
        engine.prepare([call_of(**NEW)])
        captures = engine.stats().captures
        assert_same(images(engine.submit(call_of(2, **NEW))), expected)
        assert engine.stats().captures == captures
        assert engine.stats().completed == 1
        running.cancel()
        with pytest.raises(tgate_compile.ConfigurationError, match="promt"):
            engine.prepare([{"promt": "a fox"}])
        with pytest.raises(tgate_compile.ConfigurationError, match="mappings"):
            engine.prepare(["a fox"])  # type: ignore[list-item]
    with pytest.raises(EngineClosedError):
        engine.prepare([call_of(**NEW)])


def test_others_go_on_during_a_capture(empty_cache: Path) -> None:
    pipe = tiny()
    expected = alone(tiny(), call_of(2, **NEW))
    steps: list[Progress] = []
    spans: list[tuple[float, float]] = []
    run = Captures._run

    def timed(captures: Captures, task: Any) -> None:
        before = len(steps)
        run(captures, task)
        spans.append((before, len(steps)))

    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="background") as engine:
        assert engine._served._captures is not None  # type: ignore[attr-defined]
        vars(engine._served._captures)["_run"] = timed.__get__(engine._served._captures)  # type: ignore[attr-defined]
        running = engine.submit(**endless(steps))
        while not steps:
            time.sleep(0.001)
        entries = len(list(empty_cache.rglob("*.entry")))
        assert_same(images(engine.submit(call_of(2, **NEW))), expected)
        assert len(list(empty_cache.rglob("*.entry"))) > entries
        running.cancel()
    assert spans
    assert all(after - before > 3 for before, after in spans)
    assert not [thread for thread in threading.enumerate() if thread.name == "tgate-captures"]


@pytest.mark.heavy
def test_requests_run_plain_during_a_capture(empty_cache: Path) -> None:
    pipe, plain = tiny(), stable_diffusion(layout="least")
    expected = alone(tiny(), call_of(2, **NEW))
    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="background-plain") as engine:
        first = images(engine.submit(call_of(2, **NEW)))
        assert torch.equal(first, alone(plain, call_of(2, **NEW)))
        assert engine._served._captures is not None  # type: ignore[attr-defined]
        for task in list(engine._served._captures._tasks.values()):  # type: ignore[attr-defined]
            assert task.wait(HANGS)
        assert_same(images(engine.submit(call_of(2, **NEW))), expected)


@pytest.mark.heavy
def test_batches_of_new_sizes(empty_cache: Path) -> None:
    pipe = tiny()
    calls = [call_of(number, **NEW) for number in range(2)]
    expected = [alone(tiny(), call) for call in calls]
    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="background") as engine:
        for _ in range(2):
            for result, target in zip(at_once(engine, calls), expected, strict=True):
                assert_same(images(result), target)
            for task in list(engine._served._captures._tasks.values()):  # type: ignore[attr-defined]
                assert task.wait(HANGS)
        assert batched(engine) == {"F": 2, "p": 2}


def test_requests_end_during_a_capture(empty_cache: Path) -> None:
    with Engine(tiny(), max_batch=2, new_sizes="background") as engine:
        asked = threading.Event()
        waiting = engine._served._captures.ask  # type: ignore[attr-defined]

        def ask(captures: Any) -> Any:
            tasks = waiting(captures)
            asked.set()
            return tasks

        vars(engine._served._captures)["ask"] = ask  # type: ignore[attr-defined]
        ticket = engine.submit(call_of())
        assert asked.wait(HANGS)
        assert ticket.cancel()
        with pytest.raises(CancelledError):
            ticket.result(HANGS)
        assert ticket.cancelled()


class Unfit(UNet2DConditionModel):
    """Has code from outside the known libraries, whose graphs are not kept on disk."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_what_cannot_be_captured_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion(layout="least")
    pipe.unet.__class__ = Unfit
    tgate_compile.optimize(pipe, 2, backend="eager")
    with pytest.raises(tgate_compile.ConfigurationError, match="outside the known libraries"):
        Engine(pipe, new_sizes="background")
    alone(pipe, call_of())  # it is not served
    with pytest.raises(tgate_compile.ConfigurationError, match='"background-plain", "plain", "refuse"'):
        Engine(pipe, new_sizes="later")  # type: ignore[arg-type]
    monkeypatch.setenv(FOLDER_VARIABLE, "off")
    with pytest.raises(tgate_compile.ConfigurationError, match="disk cache"):
        Engine(tiny(), new_sizes="background-plain")


@pytest.mark.heavy
def test_a_capture_that_fails_is_made_in_place(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny()
    expected = alone(tiny(), call_of(2, **NEW))

    def fail(*args: object) -> Callable[[], None]:
        def capture() -> None:
            raise ValueError("out of order")

        return capture

    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="background") as engine:
        monkeypatch.setattr(engine._served, "_capture_of", fail)
        assert_same(images(engine.submit(call_of(2, **NEW))), expected)
    assert "ended with the code 1" in caplog.text
