"""Requests to an engine, for tests."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import tgate_compile
from tests.tiny_pipelines import stable_diffusion
from tgate_compile.serve import Engine, Progress, Ticket
from tgate_compile.serve.batching import Step
from tgate_compile.serve.worker import Submission

#: Seconds after which a request counts as hanging.
HANGS = 60
GATE = 2
STEPS = 4


def tiny(**options: Any) -> Any:
    """Return an optimized Stable Diffusion with the smallest UNet."""
    return tgate_compile.optimize(
        stable_diffusion(layout="least"), **{"gate_step": GATE, "backend": "eager", **options}
    )


def call_of(number: int = 0, **call: Any) -> dict[str, Any]:
    """Return the arguments of a call with its own prompt and seed."""
    words = ["red cat", "blue dog", "green bird", "a", "old tree"]
    given = {"prompt": words[number % len(words)], "num_inference_steps": STEPS, "output_type": "latent"}
    return {**given, **call, "generator": torch.Generator().manual_seed(number)}


def alone(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """Return the latents that `pipe` makes for a call when it makes no other."""
    result: torch.Tensor = pipe(**{**call, "generator": seeded(call)}).images
    return result


def seeded(call: Mapping[str, Any]) -> torch.Generator:
    return torch.Generator().manual_seed(call["generator"].initial_seed())


def images(ticket: Ticket) -> Any:
    return ticket.result(HANGS).images


def at_once(engine: Engine, calls: Sequence[Mapping[str, Any]]) -> list[Ticket]:
    """Submit calls, and let their first steps begin together."""
    put, first = engine._worker.put, list[Submission]()

    def hold(submission: Submission) -> None:
        if not isinstance(submission.work, Step):
            put(submission)
            return
        first.append(submission)
        if len(first) == len(calls):
            vars(engine._worker).pop("put")
            for each in first:
                put(each)

    vars(engine._worker)["put"] = hold
    return [engine.submit({**call, "generator": seeded(call)}) for call in calls]


@contextmanager
def in_groups(engine: Engine, count: int) -> Iterator[None]:
    """Hand calls of a component over to the worker only when there are `count` of them, inside the context."""
    put, waiting = engine._worker.put, defaultdict[str, list[Submission]](list)

    def hold(submission: Submission) -> None:
        if not submission.work.component:
            put(submission)
            return
        group = waiting[submission.work.component]
        group.append(submission)
        if len(group) == count:
            for each in group:
                put(each)
            group.clear()

    vars(engine._worker)["put"] = hold
    yield
    vars(engine._worker).pop("put")


def batched(engine: Engine) -> dict[str, int]:
    """Return the size of the largest batch by the letter of the phase."""
    return {letter: max(sizes) for letter, sizes in engine.stats().batches.items()}


@contextmanager
def held(engine: Engine, call: Mapping[str, Any] | None = None) -> Iterator[Ticket]:
    """Keep a request between two steps inside the context."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(progress: Progress) -> None:
        inside.set()
        # The engine's other threads go on, as they do while a pipeline decodes.
        assert go_on.wait(HANGS)

    ticket = engine.submit(call_of() if call is None else call, on_step=wait, request_id="held")
    assert inside.wait(HANGS)
    try:
        yield ticket
    finally:
        go_on.set()
