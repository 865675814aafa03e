"""One generation, timed: as a whole, and from one step of the scheduler to the next."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Timed:
    """What a generation gave, and what it took.

    Attributes:
        output: the first thing of what the pipeline returns: its images, as a rule.
        latents: the final ones, [images, ...], float32 on the CPU.
        seconds: of the whole call.
        steps: of each denoiser call with what belongs to it; the first one's begins with the call itself, and so
            includes the text encoder.
    """

    output: Any
    latents: torch.Tensor
    seconds: float
    steps: tuple[float, ...]


def timed_generation(
    pipe: Any, call: Mapping[str, Any], seed: int, generate: Callable[..., Any] | None = None
) -> Timed:
    """Run `pipe` once, on noise from the CPU, which is the same on every device; or `generate`, which runs it."""
    device = torch.device(pipe.device)
    latents: list[torch.Tensor] = []
    marks: list[float] = []
    scheduler = pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)  # pipelines ask its signature whether it takes their generator
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        _synchronize(device)
        marks.append(time.perf_counter())
        latents[:] = [result[0]]
        return result

    generator = torch.Generator().manual_seed(seed)
    scheduler.step = marked
    try:
        _synchronize(device)
        began = time.perf_counter()
        output = (generate or pipe)(**call, generator=generator, return_dict=False)[0]
        _synchronize(device)
        seconds = time.perf_counter() - began
    finally:
        del scheduler.step
    steps = tuple(after - before for before, after in pairwise([began, *marks]))
    return Timed(output, latents[0].detach().to("cpu", torch.float32), seconds, steps)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
