"""Pipelines in several threads: captures take turns, and results are the same as in a single thread."""

from __future__ import annotations

import copy
import faulthandler
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tgate_compile
from tests.comparing import assert_same
from tests.own_loops import NO_TEXT, TEXTS
from tests.tiny_pipelines import image, run, stable_diffusion
from tgate_compile.engine import traffic as _traffic

#: Seconds after which a thread counts as hanging. The test is aborted later, with the stacks of all threads.
DEADLOCK = 90
GATE = 2
STEPS = 4


@pytest.fixture(autouse=True)
def _no_deadlock() -> Iterator[None]:
    faulthandler.dump_traceback_later(3 * DEADLOCK, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert _traffic._owner is None
    assert not _traffic._running
    assert not _traffic._waiting
    assert not _traffic._depth


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """Start all tasks together, each in a separate thread, and return their results or exceptions."""
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
    """Return optimized pipelines with separate denoisers and tokenizers over the same weights.

    A tokenizer cannot be shared: the fast ones of transformers keep padding and truncation as state between calls.
    """
    pipes = [stable_diffusion(name, layout="least") for _ in range(count)]
    for pipe in pipes:
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
        pipe.unet.load_state_dict(pipes[0].unet.state_dict(), assign=True)
    return [tgate_compile.optimize(pipe, GATE, **{"backend": "eager", **options}) for pipe in pipes]


def latents(pipe: Any, size: int = 16, **call: Any) -> torch.Tensor:
    result: torch.Tensor = run(pipe, steps=STEPS, height=size, width=16, **call)
    return result.clone()


def check_captures_still_work() -> None:
    assert not torch.compiler.is_exporting()
    pipe = twins(1)[0]
    assert_same(latents(pipe, gate_step=1000), latents(stable_diffusion(layout="least")))


# The locking rules on their own.


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
    """As with Ctrl-C, which only the main thread gets; here each of the three waits itself raises it."""
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

        # Within a call that began before the capture, which has given up waiting for it.
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
    """A thread gives way to one that is about to capture. If that is interrupted, the first must continue."""
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
            _traffic._changed.wait(0.3)  # the thread that gives way still sees a pending capture
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
    # A stuck thread is waited for once, not at each capture.
    assert len([record for record in caplog.records if "has been busy for" in record.getMessage()]) == 1


# Pipelines.


@pytest.fixture(scope="module")
def serial() -> dict[int, torch.Tensor]:
    """Return the latents for each size in pixels, made by one pipeline in one thread."""
    (pipe,) = twins(1)
    return {size: latents(pipe, size) for size in (16, 24)}


def test_new_sizes_at_once(serial: dict[int, torch.Tensor]) -> None:
    def work(pipe: Any, sizes: tuple[int, ...]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [latents(pipe, size) for size in sizes]

    orders = [(16, 24, 16), (24, 16, 24), (16, 24, 16)]
    results = at_once(*map(work, twins(3), orders))
    for order, result in zip(orders, results, strict=True):
        assert [torch.equal(each, serial[size]) for each, size in zip(result, order, strict=True)] == [True] * 3
    check_captures_still_work()


def test_graphs_at_hand_run_while_another_thread_captures(serial: dict[int, torch.Tensor]) -> None:
    warm, cold = twins(2)
    latents(warm)
    captured = threading.Event()

    def runs() -> list[torch.Tensor]:
        made = [latents(warm)]
        while not captured.is_set():
            made.append(latents(warm))
        return made

    def captures() -> torch.Tensor:
        try:
            return latents(cold, 24)
        finally:
            captured.set()

    made, other = at_once(runs, captures)
    assert torch.equal(other, serial[24])
    assert all(torch.equal(each, serial[16]) for each in made)


def test_text_encoders_and_vae_run_while_another_thread_captures() -> None:
    def painted(pipe: Any) -> torch.Tensor:
        result: torch.Tensor = run(pipe, image=image(), strength=0.8, steps=STEPS, output_type="pt")
        return result.clone()

    name = "StableDiffusionImg2ImgPipeline"
    warm, cold = twins(2, name)
    expected = painted(warm)
    captured = threading.Event()

    def runs() -> list[torch.Tensor]:
        made = [painted(warm)]
        while not captured.is_set():
            made.append(painted(warm))
        return made

    def captures() -> torch.Tensor:
        try:
            return painted(cold)
        finally:
            captured.set()

    made, other = at_once(runs, captures)
    assert torch.equal(other, expected)
    assert all(torch.equal(each, expected) for each in made)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "backend", ["onnxruntime", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("openvino", "inductor"))]
)
def test_other_backends(backend: str) -> None:
    pytest.importorskip({"inductor": "torch"}.get(backend, backend))
    first, second, alone = twins(3, backend=backend)
    results = at_once(lambda: latents(first), lambda: latents(second))
    expected = latents(alone)
    assert [torch.equal(result, expected) for result in results] == [True, True]


def own_loop(pipe: Any) -> torch.Tensor:
    """Run a custom denoising loop."""
    pipe.scheduler.set_timesteps(STEPS)
    texts = torch.cat([NO_TEXT, TEXTS[:1]])
    current = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with tgate_compile.generation(pipe, guidance=True), torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            prediction = pipe.unet(torch.cat([current] * 2), timestep, encoder_hidden_states=texts).sample
            uncond, cond = prediction.chunk(2)
            current = pipe.scheduler.step(uncond + 5 * (cond - uncond), timestep, current).prev_sample
    return current


def test_own_loops() -> None:
    alone, first, second = twins(3)
    expected = own_loop(alone)
    results = at_once(lambda: own_loop(first), lambda: own_loop(second), lambda: latents(alone, 24))
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
    assert torch.is_tensor(results[2])


# Errors in one thread do not affect others.


class NotExportable(torch.nn.Module):
    """Wraps a denoiser's last layer, and branches on data, which cannot be captured."""

    def __init__(self, layer: torch.nn.Module, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.error = error

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.error is not None and torch.compiler.is_exporting():
            raise self.error
        if value.sum() > 1e9:
            return value
        result: torch.Tensor = self.layer(value)
        return result


def broken(error: type[BaseException] | None = None) -> Any:
    pipe = stable_diffusion(layout="least")
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.unet.conv_out = NotExportable(pipe.unet.conv_out, error)
    return tgate_compile.optimize(pipe, GATE, backend="eager")


@pytest.mark.parametrize(
    ("error", "raised"), [(None, tgate_compile.CaptureError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_capture_that_fails_does_not_disturb_the_others(
    serial: dict[int, torch.Tensor], error: type[BaseException] | None, raised: type[BaseException]
) -> None:
    failing, (right, late) = broken(error), twins(2)
    results = at_once(lambda: latents(failing), lambda: latents(right), lambda: latents(late, 24))
    assert type(results[0]) is raised
    assert torch.equal(results[1], serial[16])
    assert torch.equal(results[2], serial[24])
    check_captures_still_work()


def test_one_pipeline_in_two_threads(serial: dict[int, torch.Tensor]) -> None:
    """Simultaneous first calls on one denoiser: all but one may be refused, as documented."""
    (pipe,) = twins(1)
    results = at_once(lambda: latents(pipe), lambda: latents(pipe), lambda: latents(pipe))
    for result in results:
        assert isinstance(result, tgate_compile.ConcurrentGenerationError) or torch.equal(result, serial[16])
    assert sum(torch.is_tensor(result) for result in results) >= 1
    assert torch.equal(latents(pipe), serial[16])


def test_describe_in_another_thread(serial: dict[int, torch.Tensor]) -> None:
    """Two pipelines over one denoiser share their graphs: one runs while the other is described."""
    (pipe,) = twins(1)
    components = {**pipe.components, "tokenizer": copy.deepcopy(pipe.tokenizer)}
    other = StableDiffusionPipeline(**components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    tgate_compile.optimize(other, GATE, backend="eager")

    def ask() -> str:
        return tgate_compile.describe(other, prompt="red cat", height=24, width=16, num_inference_steps=STEPS).strip

    made, strip = at_once(lambda: [latents(pipe, size) for size in (16, 24)], ask)
    errors = tgate_compile.ConcurrentGenerationError
    assert isinstance(strip, errors) or strip == "FFpp"
    assert isinstance(made, errors) or all(torch.equal(*pair) for pair in zip(made, serial.values(), strict=True))


# Threads that wait for each other.


def test_a_callback_that_waits_for_a_thread_that_captures(
    serial: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_traffic, "PATIENCE", 0.5)
    waiting, other = twins(2)
    captured: list[torch.Tensor] = []

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            thread = threading.Thread(target=lambda: captured.append(latents(other, 24)))
            thread.start()
            thread.join(DEADLOCK)
        return tensors

    with caplog.at_level("WARNING", "tgate_compile"):
        (result,) = at_once(lambda: latents(waiting, callback_on_step_end=wait))
    assert torch.equal(result, serial[16])
    assert torch.equal(captured[0], serial[24])
    assert [record for record in caplog.records if "has been busy for" in record.getMessage()]


def test_a_call_within_a_callback(serial: dict[int, torch.Tensor]) -> None:
    outer, inner, other = twins(3)
    made: list[torch.Tensor] = []

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 3):
            made.append(latents(inner, 24))
        return tensors

    results = at_once(lambda: latents(outer, callback_on_step_end=call), lambda: [latents(other), latents(other, 24)])
    assert torch.equal(results[0], serial[16])
    assert torch.equal(results[1][0], serial[16])
    assert all(torch.equal(each, serial[24]) for each in (results[1][1], *made))
    assert len(made) == 2
