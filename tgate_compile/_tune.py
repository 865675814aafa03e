"""`tune`: the fastest schedule within a tolerance, for one pipeline and the kind of prompts that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline

from tgate_compile._attach import attach, denoiser_names, detach
from tgate_compile._modular import check_ordinary
from tgate_compile._schedule import Schedule
from tgate_compile._tuning.request import Request
from tgate_compile._tuning.result import Tuning
from tgate_compile._tuning.search import DEFAULT_TOLERANCE, Progress, search


def tune(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    num_inference_steps: int = 25,
    candidates: Sequence[Schedule] | None = None,
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    backend: str = "eager",
    progress: Progress | None = None,
) -> Tuning:
    """Measure what schedules cost and how far they take the images from the plain pipeline's; choose the cheapest.

    Each prompt is run once as it is and once with every candidate, from the same noise. Drift is
    ||x - plain x|| / ||plain x|| of the final latents; cost is counted in multiply-accumulates of the denoiser.
    The schedule chosen is the one of the least cost whose mean drift is within `tolerance`. `docs/tuning.md` says what
    drifts are like, and how the default came about.

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, also after an error.
        prompts: a few that are like those to come; None if `call` says what to show.
        tolerance: the mean drift that is allowed, above 0.
        num_inference_steps: for which the schedule is meant.
        candidates: schedules to choose from. By default T-GATE v1 with the mean of the halves in its caches and with
            the prompt's half alone (`anchor_weight=1`), T-GATE v2 (`sp_interval=5`) and, as a baseline, guidance
            dropped with nothing cached, each at a few gates and then around the tolerance.
        seeds: the noise for each prompt.
        call: further arguments of the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`.
        backend: as for `optimize`. Drift and cost do not depend on it, and `"eager"` has nothing to compile.
        progress: called after each generation with their number, how many there will be, and what is being measured.

    Raises:
        ConfigurationError: an argument is wrong, or no candidate is within the tolerance: the message names the
            closest one.
        UnsupportedModelError: the pipeline can take no schedule, or not one of the `candidates`.
    """
    check_ordinary(pipe, "tune()")

    @contextmanager
    def gated(pipe: DiffusionPipeline, schedule: Schedule) -> Iterator[None]:
        attach(pipe, dict.fromkeys(denoiser_names(pipe, denoiser), schedule), backend=backend)
        try:
            yield
        finally:
            detach(pipe)

    request = Request(prompts, num_inference_steps, seeds, {} if call is None else call, "tune", tolerance, candidates)
    return search(pipe, request, gated, backend=backend, progress=progress)
