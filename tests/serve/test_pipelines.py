"""Pipelines with two denoisers, with a call for each half, or that start over; and the order of requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import assert_same
from tests.own_loops import looping
from tests.serve.requesting import HANGS, at_once, batched, call_of, tiny
from tests.test_on_unsupported import BeyondTheTimesteps, GuidedLate
from tests.tiny_joint import JOINT
from tests.tiny_modular import modular_sdxl, modular_sdxl_call, modular_wan, modular_wan_call
from tests.tiny_video import wan, wan_call
from tgate_compile.serve import Engine, Progress
from tgate_compile.serve.batching import Step
from tgate_compile.serve.worker import Submission

pytestmark = pytest.mark.usefixtures("no_deadlock")


def video_call(number: int, **more: Any) -> dict[str, Any]:
    """Return the arguments of a call of Wan with its own prompt and seed."""
    given = {name: each.roll(number, -1) for name, each in wan_call().items() if torch.is_tensor(each)}
    call = {**wan_call(), **given, "num_inference_steps": 4, "output_type": "latent", **more}
    return {**call, "generator": torch.Generator().manual_seed(number)}


def frames(result: Any) -> torch.Tensor:
    found: torch.Tensor = result.frames
    return found


@pytest.mark.parametrize("boundary", [pytest.param(None, marks=pytest.mark.heavy), 0.9])
def test_a_call_for_each_half_and_two_denoisers(boundary: float | None) -> None:
    pipe = wan(boundary_ratio=boundary)
    names = ("transformer",) if boundary is None else ("transformer", "transformer_2")
    gates: Any = 2 if boundary is None else (1, 1)
    tgate_compile.optimize(pipe, gates, backend="eager")
    calls = [video_call(0), video_call(1, num_inference_steps=5), video_call(2, guidance_scale=3.0)]
    expected = [frames(pipe(**{**call, "generator": torch.Generator().manual_seed(n)})) for n, call in enumerate(calls)]
    assert sum(hook.last.steps != [] for hook in pipe._tgate_compile.hooks.values()) == len(names)
    with Engine(pipe, max_batch=2, warm_up=[calls[1]], new_sizes="refuse") as engine:
        captures = engine.stats().captures
        for ticket, target in zip(at_once(engine, calls), expected, strict=True):
            assert_same(frames(ticket.result(HANGS)), target)
        assert max(batched(engine).values()) == 2
        assert engine.stats().captures == captures
        assert not engine.stats().one_at_a_time


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [(BeyondTheTimesteps, {"gate_step": 3}), (GuidedLate, {"gate_step": 5, "sp_interval": 3, "warm_up": 1})],
)
def test_requests_that_start_over(pipeline: type[Any], options: dict[str, Any]) -> None:
    expected = looping(pipeline)()
    pipe = tgate_compile.optimize(looping(pipeline), **options, backend="eager", on_unsupported="plain")
    with Engine(pipe, max_batch=2) as engine:
        tickets = [engine.submit({}) for _ in range(3)]
        for ticket in tickets:
            assert_same(ticket.result(HANGS), expected)  # its first steps may have been batched
        assert engine.stats().completed == 3
        assert not engine.stats().errors
    assert torch.equal(pipe(), expected)


def test_an_odd_request_gets_its_turns() -> None:
    """Requests that cannot be batched with many others do not wait for all of these."""
    many = [call_of(number, num_inference_steps=30) for number in range(6)]
    odd = call_of(7, num_inference_steps=20, height=16, width=32)
    with Engine(tiny(), max_batch=2, max_running=8, warm_up=[call_of(), odd]) as engine:
        choose = engine._worker._choose
        waits = [0]  # how many batches of others ran while each of its steps waited

        def is_odd(submission: Submission) -> bool:
            request = submission.request
            return request is not None and "height" in request.call and isinstance(submission.work, Step)

        def note() -> list[Submission]:
            waiting = list(engine._worker._submissions)
            group = choose()
            if any(map(is_odd, group)):
                waits.append(0)
            elif any(map(is_odd, waiting)):
                waits[-1] += 1
            return group

        vars(engine._worker)["_choose"] = note
        for ticket in at_once(engine, [*many, odd]):
            ticket.result(HANGS)
    assert len(waits) == 1 + 20
    # Only what was submitted earlier runs first: at most one step of each of the others.
    assert 0 < max(waits) <= len(many)


def test_the_oldest_request_begins_first() -> None:
    begun: list[str] = []

    def note(progress: Progress) -> None:
        if progress.request_id not in begun:
            begun.append(progress.request_id)

    with Engine(tiny(), max_batch=1, max_running=1) as engine:
        tickets = [engine.submit(call_of(n), on_step=note, request_id=str(n)) for n in range(6)]
        for ticket in tickets:
            ticket.result(HANGS)
    assert begun == [str(n) for n in range(6)]


def test_modular_pipelines() -> None:
    pipe = tgate_compile.optimize(modular_wan(), 2, backend="eager")
    calls = [{**modular_wan_call(), "num_inference_steps": steps, "output": "latents"} for steps in (4, 6)]
    calls[1]["latents"] = calls[1]["latents"].roll(1, -1)
    expected = [pipe(**call) for call in calls]
    with Engine(pipe, max_batch=2) as engine:
        # The guider of each request counts its own steps.
        tickets = [engine.submit(call) for call in calls]
        for ticket, target in zip(tickets, expected, strict=True):
            assert_same(ticket.result(HANGS), target)
        assert max(batched(engine).values()) == 2
    assert torch.equal(pipe(**calls[0]), expected[0])


@pytest.mark.heavy
def test_modular_pipelines_from_prompts() -> None:
    pipe = tgate_compile.optimize(modular_sdxl(), 2, backend="eager")
    calls = [
        {**modular_sdxl_call(), "prompt": prompt, "num_inference_steps": 4, "output": "latents"}
        for prompt in ("red cat", "blue dog")
    ]
    expected = [pipe(**call, generator=torch.Generator().manual_seed(0)) for call in calls]
    with Engine(pipe, max_batch=2) as engine:
        tickets = [engine.submit({**call, "generator": torch.Generator().manual_seed(0)}) for call in calls]
        for ticket, target in zip(tickets, expected, strict=True):
            assert_same(ticket.result(HANGS), target)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_true_guidance(name: str) -> None:
    """Qwen-Image's negative prompt has fewer tokens than its prompt, so the halves' calls have different shapes."""
    case = JOINT[name]
    pipe = tgate_compile.optimize(case.build(), 2, backend="eager")
    calls = []
    for number in range(2):
        given = case.call(1)
        embeds = {key: each.roll(number, -1) for key, each in given.items() if key.endswith("embeds")}
        calls.append({**given, **embeds, "num_inference_steps": 4 + number, "output_type": "latent"})
    generators = [torch.Generator().manual_seed(number) for number in range(4)]
    expected = [pipe(**call, generator=each).images for call, each in zip(calls, generators, strict=False)]
    generators = [torch.Generator().manual_seed(number) for number in range(4)]
    with Engine(pipe, max_batch=2) as engine:
        given = [{**call, "generator": each} for call, each in zip(calls, generators, strict=False)]
        for ticket, target in zip(at_once(engine, given), expected, strict=True):
            assert_same(ticket.result(HANGS).images, target)
        assert max(batched(engine).values()) == 2
