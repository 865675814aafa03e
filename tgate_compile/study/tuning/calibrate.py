"""Calibrate MagCache and TeaCache: measure in plain generations what these methods have to know of a model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from diffusers import DiffusionPipeline

from tgate_compile._errors import ConfigurationError, check_pipeline_first
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.methods.mag_cache import MagCache
from tgate_compile.methods.method import ValueOfBlocks
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.tea_cache import (
    PolynomialFit,
    Series,
    TeaCache,
    fit_polynomial,
    skipped_by_threshold,
    threshold_for,
)  # fmt: skip
from tgate_compile.pipeline.attach import attached, denoiser_names
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.study.tuning.measure import final_latents, guided, magnitude_ratios, silent
from tgate_compile.study.tuning.recorder import Changes
from tgate_compile.study.tuning.request import Runs

logger = logging.getLogger(__name__)

#: Called after each generation with the number done, the total, and a description of what was run.
Calibrating = Callable[[int, int, str], None]


def calibrate_mag_cache(
    pipe: AnyPipeline,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int = 25,
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    front: int = 0,
    progress: Calibrating | None = None,
) -> MagCache:
    """Measure the ratios that MagCache needs, and return the method with them.

    The ratios hardly depend on the prompt, so one prompt is enough. With several prompts or seeds, the ratios are
    averaged. They are specific to the model, the scheduler and the guidance scale; a call with a different number of
    steps uses the ratios of the nearest steps. To keep them, write the schedule to a file:

        method = tgate_compile.calibrate_mag_cache(pipe, ["a red fox in snow"], num_inference_steps=28)
        tgate_compile.save_schedule(tgate_compile.Schedule.of(method), "magcache.json")
        tgate_compile.optimize(pipe, dataclasses.replace(method, threshold=0.1))  # a higher threshold skips more steps

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, even after an error.
        prompts: prompts; None if `call` contains prompt embeddings.
        num_inference_steps: as for the pipeline's call.
        seeds: the seeds of the noise; each prompt runs once with each seed.
        call: further arguments for the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`. Needed if the pipeline has two denoisers, which are calibrated one by one.
        front: the number of blocks at the front that every step will compute, as in `MagCache`.
        progress: called after each generation with the number of generations done, the total, and a description.

    Returns:
        MagCache with these ratios, and the defaults for everything else.

    Raises:
        ConfigurationError: an argument is invalid.
        UnsupportedModelError: the denoiser has no stack of blocks whose residual can be cached.
    """
    check_pipeline_first("calibrate_mag_cache", pipe, prompts)
    check_ordinary(pipe, "calibrate_mag_cache()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "calibrate_mag_cache")
    name = _only_denoiser(pipe, denoiser, "ratios")
    method = MagCache((1.0,), front=front)
    with attached(pipe, Schedule.of(method), (name,), backend="eager"):
        pass  # report errors before any work is done
    measured: list[tuple[float, ...]] = []

    def generate(call: Mapping[str, Any], seed: int) -> None:
        measured.append(magnitude_ratios(pipe, getattr(pipe, name), call, seed, front=method.front))

    _for_each_generation(pipe, runs, generate, "MagCache", progress)
    means = [math.fsum(of_step) / len(measured) for of_step in zip(*measured, strict=True)]
    return dataclasses.replace(method, ratios=tuple(means))


def _for_each_generation(
    pipe: DiffusionPipeline,
    runs: Runs,
    generate: Callable[[Mapping[str, Any], int], None],
    method: str,
    progress: Calibrating | None,
) -> None:
    """Call `generate` with the arguments and the seed of each generation of `runs`."""
    calls = [(each, seed) for each in runs.calls(pipe) for seed in runs.seeds]
    with silent(pipe):
        for number, (each, seed) in enumerate(calls, 1):
            generate(each, seed)
            if progress is not None:
                progress(number, len(calls), f"calibration of {method}")


def _only_denoiser(pipe: DiffusionPipeline, denoiser: str | None, what: str) -> str:
    """Return the name of the denoiser to calibrate."""
    names = denoiser_names(pipe, denoiser)
    if len(names) > 1:
        raise ConfigurationError(
            f"This {type(pipe).__name__} has several denoisers ({', '.join(names)}), each with {what} of its own. "
            f'Calibrate one at a time, with denoiser="{names[0]}".'
        )
    return names[0]


@dataclass(frozen=True)
class TeaCacheFit:
    """TeaCache with a polynomial that was fitted to a model.

    Attributes:
        method: the method.
        fits: the best polynomial for each measured value that the model has.
        skipped: the share of the steps that would have been skipped in the recorded generations, by threshold.
        series: the recorded changes, for the value that `method` measures.
    """

    method: TeaCache
    fits: Mapping[str, PolynomialFit]
    skipped: Mapping[float, float]
    series: Sequence[Series]

    @property
    def r_squared(self) -> float:
        """How well the polynomial estimates the changes in generations that it was not fitted to; 1 is perfect."""
        return self.fits[self.method.measured].r_squared


_POOR_FIT = 0.5  # below, the estimates hardly tell one step from another


def fit_tea_cache(
    pipe: AnyPipeline,
    runs: Runs,
    *,
    denoiser: str | None = None,
    threshold: float | None = None,
    skip: float = 0.5,
    measured: str = "",
    progress: Calibrating | None = None,
) -> TeaCacheFit:
    """Do the work of `calibrate_tea_cache`, and return what was found besides the method."""
    if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 < skip < 1:
        raise ConfigurationError(f"skip must be a share of the steps between 0 and 1, such as 0.5, but got {skip!r}.")
    unfitted = TeaCache(1.0 if threshold is None else threshold, coefficients=(1.0, 0.0), measured=measured)
    name = _only_denoiser(pipe, denoiser, "a polynomial")
    with attached(pipe, Schedule.of(unfitted), (name,), backend="eager"):
        pass  # report errors before any work is done
    wanted = [value for value in get_args(ValueOfBlocks) if value == measured or (not measured and value != "residual")]
    recorded: dict[str, list[Sequence[Series]]] = defaultdict(list)
    changes = Changes(pipe, getattr(pipe, name), wanted)

    def generate(call: Mapping[str, Any], seed: int) -> None:
        with changes.recording(guided(pipe, call)):
            final_latents(pipe, call, seed)
        for value, series in changes.series.items():
            recorded[value].append(series)

    _for_each_generation(pipe, runs, generate, "TeaCache", progress)
    # The last step is always computed, so its estimate is never used.
    fits = {
        value: fit_polynomial([[point for series in each for point in series[:-1]] for each in generations])
        for value, generations in recorded.items()
    }
    best = max(fits, key=lambda value: fits[value].r_squared)
    coefficients, r_squared = fits[best]
    series = [series for generation in recorded[best] for series in generation]
    chosen = threshold_for(coefficients, series, skip) if threshold is None else threshold
    method = TeaCache(chosen, coefficients=coefficients, measured=best)
    logger.info(
        "TeaCache measures the %s; the polynomial has degree %d, R² %.3f", best, len(coefficients) - 1, r_squared
    )
    if r_squared < _POOR_FIT:
        logger.warning(
            "The change of the %s explains only %.0f %% of the variance of the residual's change (R² of TeaCache's "
            "polynomial), so it is a poor guide to which steps can be skipped. Compare FirstBlockCache and MagCache.",
            best, 100 * max(0.0, r_squared),
        )  # fmt: skip
    return TeaCacheFit(method, fits, skipped_by_threshold(coefficients, series, chosen), series)


def calibrate_tea_cache(
    pipe: AnyPipeline,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int = 25,
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    threshold: float | None = None,
    skip: float = 0.5,
    measured: str = "",
    progress: Calibrating | None = None,
) -> TeaCache:
    """Fit the polynomial that TeaCache needs to a model, and return the method with it.

    In plain generations, the changes of the measured value and of the residual over the blocks from step to step are
    recorded, and a polynomial of degree 1 to 4 that estimates the second from the first is fitted by least squares. The
    degree, and the value to measure if the model has both, are chosen by how well left-out generations are estimated.
    Four to eight different prompts are enough. The polynomial is specific to the model, the scheduler and the guidance
    scale, and roughly to the number of steps. To keep it, write the schedule to a file:

        method = tgate_compile.calibrate_tea_cache(pipe, prompts, num_inference_steps=28, skip=0.6)
        tgate_compile.save_schedule(tgate_compile.Schedule.of(method), "teacache.json")
        tgate_compile.optimize(pipe, method)

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, even after an error.
        prompts: prompts; None if `call` contains prompt embeddings.
        num_inference_steps: as for the pipeline's call.
        seeds: the seeds of the noise; each prompt runs once with each seed.
        call: further arguments for the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`. Needed if the pipeline has two denoisers, which are calibrated one by one.
        threshold: the threshold of the method; None chooses it by `skip`.
        skip: the share of the steps to skip, on average over the recorded generations; others may skip more or fewer.
        measured: the value to measure, "modulated input" or "time embedding"; empty tries both.
        progress: called after each generation with the number of generations done, the total, and a description.

    Returns:
        TeaCache with this polynomial.

    Raises:
        ConfigurationError: an argument is invalid.
        UnsupportedModelError: the denoiser does not have exactly one stack of blocks, or neither of the values.
    """
    check_pipeline_first("calibrate_tea_cache", pipe, prompts)
    check_ordinary(pipe, "calibrate_tea_cache()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "calibrate_tea_cache")
    return fit_tea_cache(
        pipe, runs, denoiser=denoiser, threshold=threshold, skip=skip, measured=measured, progress=progress
    ).method
