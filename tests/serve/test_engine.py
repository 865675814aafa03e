"""Many requests at a time: each gets the result that it gets alone, whatever else is running."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.serve.requesting import GATE, HANGS, STEPS, alone, at_once, batched, call_of, held, images, tiny
from tests.tiny_pipelines import LATENT_SIZE, add_lora, pixart, pixart_prompt, sdxl, stable_diffusion
from tests.tiny_transformers import embedded_prompts, stable_diffusion_3
from tgate_compile.serve import (
    Engine,
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineTimeoutError,
    Progress,
    Ticket,
)
from tgate_compile.serve.worker import Job

pytestmark = pytest.mark.usefixtures("no_deadlock")


# Results.

MIXED = [
    {},
    {"num_inference_steps": 6},
    {"guidance_scale": 3.0},
    {"gate_step": 3, "num_inference_steps": 5},
    {"guidance_scale": 1.0},
    {"gate_step": 1},
    {"prompt": ["red cat", "blue dog"]},
]


def test_requests_of_stable_diffusion() -> None:
    pipe = tiny()
    calls = [call_of(number, **more) for number, more in enumerate(MIXED)]
    expected = [alone(pipe, call) for call in calls]
    with Engine(pipe, max_batch=4) as engine:
        for result, target in zip(at_once(engine, calls), expected, strict=True):
            assert_same(images(result), target)
        assert batched(engine)["F"] >= 2
        assert batched(engine)["p"] >= 2
        stats = engine.stats()
    assert stats.completed == len(calls)
    assert not stats.errors
    assert not stats.running
    assert not stats.cache_bytes
    assert torch.equal(alone(pipe, calls[0]), expected[0])  # the pipeline is as it was


def test_equal_batches_have_equal_bits() -> None:
    pipe = tiny()
    expected = alone(pipe, call_of(1))
    with Engine(pipe, max_batch=1) as engine:
        tickets = [engine.submit(call_of(number)) for number in (1, 2, 1)]
        assert torch.equal(images(tickets[0]), expected)
        assert torch.equal(images(tickets[2]), expected)
        assert_differ(images(tickets[1]), expected)


def sd3_call(number: int) -> dict[str, Any]:
    embeds = {name: each.roll(number, -1) for name, each in embedded_prompts(1).items()}
    pooled = {f"{half}pooled_prompt_embeds": embeds[f"{half}prompt_embeds"][:, 0].clone() for half in ("", "negative_")}
    return {**embeds, **pooled, "prompt": None, "height": 8 * LATENT_SIZE, "width": 8 * LATENT_SIZE}


def pixart_call(number: int) -> dict[str, Any]:
    given = pixart_prompt()
    return {**given, "prompt_embeds": given["prompt_embeds"].roll(number, -1)}


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "sdxl": (sdxl, lambda number: {"original_size": (16 * (number + 1), 16)}),
    "pixart": (pixart, pixart_call),
    "sd3": (stable_diffusion_3, sd3_call),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", OTHERS)
def test_requests_of_other_pipelines(name: str) -> None:
    make, more = OTHERS[name]
    pipe = tgate_compile.optimize(make(), GATE, backend="eager")
    calls = [call_of(number, **more(number), **MIXED[number]) for number in range(4)]
    expected = [alone(pipe, call) for call in calls]
    with Engine(pipe, max_batch=2, warm_up=calls[:1]) as engine:
        for result, target in zip(at_once(engine, calls), expected, strict=True):
            assert_same(images(result), target)
        assert batched(engine)["F"] == 2
        assert batched(engine)["p"] == 2


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [
        {"gate_step": 3, "deepcache_interval": 2},
        {"gate_step": None, "guidance_step": 2},
        {"gate_step": 3, "sp_interval": 2, "fi_interval": 2, "warm_up": 0},
        {"binding_times": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_schedules(options: dict[str, Any]) -> None:
    layout = "small" if "deepcache_interval" in options else "least"
    pipe = tgate_compile.optimize(stable_diffusion(layout=layout), **{"gate_step": GATE, "backend": "eager", **options})
    calls = [call_of(number, num_inference_steps=STEPS + 2 * number) for number in range(2)]
    expected = [alone(pipe, call) for call in calls]
    with Engine(pipe, max_batch=2, warm_up=calls[1:]) as engine:
        for result, target in zip(at_once(engine, calls), expected, strict=True):
            assert_same(images(result), target)
        assert batched(engine)["F"] == 2


class Particular(UNet2DConditionModel):
    """A denoiser that takes one row at a time, or whose rows depend on each other if there are three."""

    kind = ""

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.kind == "few rows" and sample.shape[0] > 1:
            raise ValueError(f"{sample.shape[0]} rows are too many")
        if self.kind == "mixed rows" and sample.shape[0] == 3:
            sample = sample + 0.1 * sample.mean(0, keepdim=True)
        if self.kind == "one timestep":
            encoder_hidden_states = encoder_hidden_states * (
                1 + 0.001 * timestep
            )  # [tokens, dim] and [rows] do not fit
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason", "largest"),
    [
        ("few rows", "a batch failed", 1),
        ("mixed rows", "differ from those of separate runs", 3),
        ("one timestep", "a separate timestep for each image", 1),
    ],
)
def test_a_denoiser_that_cannot_be_batched(
    kind: str, reason: str, largest: int, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = stable_diffusion(layout="least")
    pipe.unet.__class__ = Particular
    pipe.unet.kind = kind
    guidance = 5.0 if kind == "one timestep" else 1.0
    pipe = tgate_compile.optimize(pipe, None, guidance_step=2, backend="eager")
    calls = [call_of(number, guidance_scale=guidance) for number in range(3)]
    expected = [alone(pipe, call) for call in calls]
    caplog.set_level(logging.WARNING, "tgate_compile.serve")
    with Engine(pipe, max_batch=3) as engine:
        for turn in range(2):
            for result, target in zip(at_once(engine, calls), expected, strict=True):
                assert_same(images(result), target)
            if not turn:
                known = len(caplog.records)
        assert max(batched(engine).values()) == largest
    assert "one at a time" in caplog.text
    assert reason in caplog.text
    assert len(caplog.records) == known  # the second time there was nothing to find out


# Waiting, ending early.


def test_progress_and_a_partial_image() -> None:
    seen: list[tuple[Progress, Any]] = []
    with Engine(tiny(), max_batch=2) as engine:

        def note(progress: Progress) -> None:
            seen.append((progress, engine.decode(progress.latents())))

        final = images(engine.submit(call_of(output_type="pil"), on_step=note, request_id="mine"))
    assert [(each.step, each.steps, each.phase) for each, _ in seen] == [
        (0, 4, "F"),
        (1, 4, "F"),
        (2, 4, "p"),
        (3, 4, "p"),
    ]
    assert {each.request_id for each, _ in seen} == {"mine"}
    assert seen[-1][1][0].size == final[0].size


def test_cancelled_requests() -> None:
    with Engine(tiny(), max_batch=2, max_running=1) as engine:
        with held(engine) as running:
            waiting = engine.submit(call_of(1))
            ended: list[Ticket] = []
            waiting.add_done_callback(ended.append)
            assert waiting.cancel()
            assert ended == [waiting]
            assert waiting.cancelled()
            assert running.cancel()
            assert not running.done()  # it ends before its next step
        with pytest.raises(CancelledError):
            running.result(HANGS)
        assert not running.cancel()
        done = engine.submit(call_of(2))
        images(done)
        assert not done.cancel()
        assert engine.stats().cancelled == 2


def test_requests_that_take_too_long() -> None:
    with Engine(tiny(), max_batch=2, max_running=1, timeout=HANGS) as engine:
        with held(engine), pytest.raises(EngineTimeoutError, match="waiting to begin"):
            engine.submit(call_of(1), timeout=0.05).result(HANGS)
        late = engine.submit(call_of(), timeout=1.0, on_step=lambda progress: time.sleep(1.1))
        with pytest.raises(EngineTimeoutError, match=r"step \d of 4"):
            late.result(HANGS)
        assert engine.stats().errors == {"EngineTimeoutError": 2}


def test_too_many_requests() -> None:
    with Engine(tiny(), max_batch=2, max_running=1, max_waiting=1) as engine:
        with held(engine):
            waiting = engine.submit(call_of(1))
            assert engine.stats().waiting == 1
            with pytest.raises(EngineBusyError, match="max_waiting=1"):
                engine.submit(call_of(2))
        images(waiting)


def test_a_wrong_request_fails_alone() -> None:
    pipe = tiny()
    expected = alone(pipe, call_of(1))

    def fail(progress: Progress) -> None:
        raise KeyError("a mistake")

    with Engine(pipe, max_batch=4) as engine:
        right = engine.submit(call_of(1))
        wrong = engine.submit(call_of(2), on_step=fail)
        odd = engine.submit(call_of(3, prompt=None, prompt_embeds=torch.ones(1, 4, 33)))
        assert_same(images(right), expected)
        with pytest.raises(KeyError, match="a mistake"):
            wrong.result(HANGS)
        assert odd.exception(HANGS) is not None
        with pytest.raises(tgate_compile.ConfigurationError, match="promt"):
            engine.submit({"promt": "a fox"})
        assert_same(images(engine.submit(call_of(1))), expected)


def test_the_worker_fails(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny()
    expected = alone(pipe, call_of(1))

    def crash() -> None:
        raise SystemExit("out of order")

    with Engine(pipe, max_batch=2) as engine:
        with held(engine) as ticket, caplog.at_level(logging.CRITICAL), pytest.raises(EngineCrashedError):
            engine.compute(Job(crash))
        with pytest.raises(EngineCrashedError, match=r"held .* out of order"):
            ticket.result(HANGS)
        assert_same(images(engine.submit(call_of(1))), expected)
        assert engine.ready


def test_closing() -> None:
    pipe = tiny()
    engine = Engine(pipe, max_batch=2, max_running=1)
    with pytest.raises(tgate_compile.ConcurrentGenerationError, match="served by"):
        alone(pipe, call_of())
    with pytest.raises(tgate_compile.ConcurrentGenerationError):
        tgate_compile.restore(pipe)
    with pytest.raises(tgate_compile.ConcurrentGenerationError, match="served by"):
        Engine(pipe)
    tickets = [engine.submit(call_of(number)) for number in range(3)]
    engine.close()
    assert all(ticket.exception(0) is None for ticket in tickets)
    assert not engine.ready
    with pytest.raises(EngineClosedError):
        engine.submit(call_of())
    engine.close()

    engine = Engine(pipe, max_batch=2, max_running=1)
    with held(engine) as running:
        waiting = engine.submit(call_of(1))
        closing = threading.Thread(target=engine.close, args=(False,))
        closing.start()
        with pytest.raises(EngineClosedError):
            waiting.result(HANGS)
    with pytest.raises(EngineClosedError, match="held"):
        running.result(HANGS)
    closing.join(HANGS)
    alone(pipe, call_of())
    tgate_compile.restore(pipe)


def test_memory_for_caches() -> None:
    pipe = tiny()
    expected = [alone(pipe, call_of(number)) for number in range(3)]
    with Engine(pipe, max_batch=2) as engine:
        taken: list[int] = []
        images(engine.submit(call_of(), on_step=lambda progress: taken.append(engine.stats().cache_bytes)))
    assert taken[0] > 0
    most: list[int] = []
    with Engine(pipe, max_batch=2, memory=taken[0]) as engine:
        tickets = [
            engine.submit(call_of(number), on_step=lambda progress: most.append(engine.stats().cache_bytes))
            for number in range(3)
        ]
        for ticket, target in zip(tickets, expected, strict=True):
            assert_same(images(ticket), target)
        assert max(most) == taken[0]
        assert batched(engine) == {"F": 1, "p": 1}
    with (
        Engine(pipe, max_batch=2, memory=taken[0] - 1) as engine,
        pytest.raises(tgate_compile.UnsupportedCallError, match="memory="),
    ):
        images(engine.submit(call_of()))


# Sizes.


def test_nothing_is_compiled_after_the_warm_up() -> None:
    pipe = tiny()
    warm_up = [call_of(), call_of(guidance_scale=1.0)]
    with Engine(pipe, max_batch=4, warm_up=warm_up, new_sizes="refuse") as engine:
        captures = engine.stats().captures
        assert captures
        assert engine.stats().completed == 0
        for ticket in [engine.submit(call_of(number, **more)) for number, more in enumerate(MIXED)]:
            images(ticket)
        assert engine.stats().captures == captures
        with pytest.raises(tgate_compile.UnsupportedCallError, match="warm_up"):
            images(engine.submit(call_of(height=16, width=32)))
        assert engine.stats().captures == captures


def test_new_sizes_run_plain() -> None:
    pipe, plain = tiny(), stable_diffusion(layout="least")
    with Engine(pipe, max_batch=2, warm_up=[call_of()], new_sizes="plain") as engine:
        captures = engine.stats().captures
        ticket, known = engine.submit(call_of(height=16, width=32)), engine.submit(call_of())
        assert torch.equal(images(ticket), alone(plain, call_of(height=16, width=32)))
        assert_differ(images(known), alone(plain, call_of()))
        assert engine.stats().captures == captures


def test_new_sizes_are_captured() -> None:
    pipe = tiny()
    expected = alone(pipe, call_of(height=16, width=32))
    with Engine(pipe, max_batch=2, warm_up=[call_of()]) as engine:
        tickets = [engine.submit(call_of(height=16, width=32)), engine.submit(call_of())]
        assert_same(images(tickets[0]), expected)
        images(tickets[1])


# Adapters.


@pytest.mark.heavy
def test_adapters_for_each_request() -> None:
    pipe = tiny()
    add_lora(pipe.unet, "first", 10)
    add_lora(pipe.unet, "second", 11)
    pipe.unet.set_adapters(["first"], [0.5])
    choices: list[dict[str, float] | None] = [None, {"second": 1.0}, {}]
    expected = [alone(pipe, call_of())]
    for choice in choices[1:]:
        assert choice is not None
        pipe.unet.set_adapters([*choice] or ["first"], [*choice.values()] or [0.0])
        expected.append(alone(pipe, call_of()))
    pipe.unet.set_adapters(["first"], [0.5])
    with Engine(pipe, max_batch=2) as engine:
        tickets = [engine.submit(call_of(), lora=choice) for choice in choices]
        for ticket, target in zip(tickets, expected, strict=True):
            assert_same(images(ticket), target)
        with pytest.raises(tgate_compile.ConfigurationError, match="third"):
            engine.submit(call_of(), lora={"third": 1.0})
    assert_same(alone(pipe, call_of()), expected[0])
    for left, right in itertools.pairwise(expected):
        assert_differ(left, right)
