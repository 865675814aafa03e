"""Pipelines in several threads: captures take turns, and every result is the one that a single thread gets."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_same
from tests.own_loops import NO_TEXT, TEXTS
from tests.tiny_pipelines import PROMPTS, image, run, stable_diffusion
from tgate_compile import _traffic

#: Seconds after which a test that hangs is broken off, with the stacks of all threads.
DEADLOCK = 120
GATE = 2
STEPS = 4


@pytest.fixture(autouse=True)
def _no_deadlock() -> Iterator[None]:
    faulthandler.dump_traceback_later(DEADLOCK, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert _traffic._owner is None
    assert not _traffic._running
    assert not _traffic._waiting
    assert not _traffic._depth


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, or the exceptions that they raise, each in a thread of its own; all begin together."""
    barrier = threading.Barrier(len(tasks))
    results: list[Any] = [None] * len(tasks)

    def work(position: int) -> None:
        barrier.wait(DEADLOCK)
        try:
            results[position] = tasks[position]()
        except BaseException as error:
            results[position] = error

    threads = [threading.Thread(target=work, args=(position,), daemon=True) for position in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK)
        assert not thread.is_alive()
    return results


def twins(count: int, name: str = "StableDiffusionPipeline", **options: Any) -> list[Any]:
    """Optimized pipelines with denoisers of their own, over the same weights."""
    pipes = [stable_diffusion(name, layout="small") for _ in range(count)]
    for pipe in pipes[1:]:
        pipe.unet.load_state_dict(pipes[0].unet.state_dict(), assign=True)
    return [tgate_compile.optimize(pipe, GATE, **{"backend": "eager", **options}) for pipe in pipes]


def latents(pipe: Any, size: int = 16, **call: Any) -> torch.Tensor:
    result: torch.Tensor = run(pipe, steps=STEPS, height=size, width=16, **call)
    return result.clone()


def check_captures_still_work() -> None:
    assert not torch.compiler.is_exporting()
    pipe = twins(1)[0]
    assert_same(latents(pipe, gate_step=1000), latents(stable_diffusion(layout="small")))


# The traffic rules by themselves.


def test_a_capture_waits_for_running_threads() -> None:
    seen: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def runs() -> None:
        with _traffic.running():
            inside.set()
            assert leave.wait(DEADLOCK)
            seen.append("ran")

    def captures() -> None:
        assert inside.wait(DEADLOCK)
        threading.Timer(0.1, leave.set).start()
        with _traffic.exclusive():
            seen.append("captured")

    assert at_once(runs, captures) == [None, None]
    assert seen == ["ran", "captured"]


def test_a_running_thread_gives_way() -> None:
    seen: list[str] = []
    inside, captured = threading.Event(), threading.Event()

    def runs() -> None:
        with _traffic.running(), _traffic.running():
            inside.set()
            while not captured.is_set():
                _traffic.give_way()
            seen.append("ran on")
            assert _traffic._running[threading.get_ident()] == 2

    def captures() -> None:
        assert inside.wait(DEADLOCK)
        with _traffic.running(), _traffic.exclusive(), _traffic.running(), _traffic.exclusive():
            assert set(_traffic._running) <= {threading.get_ident()}
            seen.append("captured")
            captured.set()

    assert at_once(runs, captures) == [None, None]
    assert seen == ["captured", "ran on"]


def test_nobody_begins_to_run_while_another_captures() -> None:
    capturing = threading.Event()
    busy: list[bool] = []

    def captures() -> None:
        with _traffic.exclusive():
            capturing.set()
            for _ in range(50):
                busy.append(bool(_traffic._running))
                threading.Event().wait(0.002)

    def runs() -> None:
        assert capturing.wait(DEADLOCK)
        with _traffic.running():
            assert _traffic._owner is None

    assert at_once(captures, runs, runs) == [None, None, None]
    assert not any(busy)


def test_many_threads_take_turns() -> None:
    owners: set[int] = set()

    def work() -> None:
        me = threading.get_ident()
        for turn in range(60):
            with _traffic.running():
                _traffic.give_way()
                if turn % 3 == 0:
                    with _traffic.exclusive():
                        assert not owners
                        owners.add(me)
                        threading.Event().wait(0.0005)
                        owners.remove(me)
                assert not owners
                assert _traffic._running[me] == 1

    assert at_once(*[work] * 6) == [None] * 6


def test_a_wait_that_is_interrupted_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C, which only the main thread gets; here from the wait itself, in each of the three waits."""
    capturing, interrupted = threading.Event(), threading.Event()
    wait_for = _traffic._changed.wait_for

    def captures() -> None:
        with _traffic.exclusive():
            capturing.set()
            assert interrupted.wait(DEADLOCK)

    def is_interrupted() -> None:
        assert capturing.wait(DEADLOCK)
        me = threading.get_ident()

        def interrupt(condition: Callable[[], bool], timeout: float | None = None) -> bool:
            if threading.get_ident() == me:
                raise KeyboardInterrupt
            return wait_for(condition, timeout)

        # Inside of a call that has begun before the capture, whose waiting the capture has given up.
        with _traffic._changed:
            _traffic._running[me] = 2
        monkeypatch.setattr(_traffic._changed, "wait_for", interrupt)
        for waits in (_traffic.give_way, _traffic.exclusive().__enter__, _traffic.running().__enter__):
            with pytest.raises(KeyboardInterrupt):
                waits()
            assert _traffic._running[me] == 2
            assert not _traffic._waiting
        with _traffic._changed:
            del _traffic._running[me]
        interrupted.set()

    assert at_once(captures, is_interrupted) == [None, None]


def test_threads_that_wait_hear_of_a_capture_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread gives way to one that wants to capture. If that is interrupted, it must go on."""
    capturing, waiting = threading.Event(), threading.Event()
    wait_for = _traffic._changed.wait_for
    gave_up = threading.Event()

    def captures() -> None:
        with _traffic.exclusive():
            capturing.set()
            assert waiting.wait(DEADLOCK)

    def gives_up() -> None:
        assert capturing.wait(DEADLOCK)
        me = threading.get_ident()

        def interrupt(condition: Callable[[], bool], timeout: float | None = None) -> bool:
            if threading.get_ident() != me:
                return wait_for(condition, timeout)
            waiting.set()
            wait_for(lambda: _traffic._owner is None)
            _traffic._changed.wait(0.3)  # the thread that gives way looks, and sees one that still wants to capture
            raise KeyboardInterrupt

        monkeypatch.setattr(_traffic._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _traffic.exclusive().__enter__()
        gave_up.set()

    def gives_way() -> None:
        assert waiting.wait(DEADLOCK)
        _traffic.give_way()
        assert gave_up.wait(DEADLOCK)

    assert at_once(captures, gives_up, gives_way) == [None, None, None]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_traffic, "PATIENCE", 0.2)
    inside, captured = threading.Event(), threading.Event()

    def waits() -> None:
        with _traffic.running():
            inside.set()
            assert captured.wait(DEADLOCK)

    def captures() -> None:
        assert inside.wait(DEADLOCK)
        for _ in range(3):
            with _traffic.exclusive():
                pass
        captured.set()

    with caplog.at_level("WARNING", "tgate_compile"):
        assert at_once(waits, captures) == [None, None]
    # The thread that does not move is waited for once, not at each capture.
    assert len([record for record in caplog.records if "has been busy for" in record.getMessage()]) == 1
