"""Measure schedules: their images' drift from the plain pipeline's, and their cost. Calibrate MagCache and TeaCache."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import ConfigurationError, UnsupportedModelError, check_pipeline_first
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.engine.families import family_of
from tgate_compile.methods.mag_cache import MagCache
from tgate_compile.methods.method import Blocks, Phase, ValueOfBlocks
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.tea_cache import (
    PolynomialFit,
    Series,
    TeaCache,
    fit_polynomial,
    skipped_by_threshold,
    threshold_for,
)  # fmt: skip
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.pipeline.attach import attached, denoiser_names, with_possible_half
from tgate_compile.pipeline.decisions import strip_of
from tgate_compile.pipeline.facts import guidance_of
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.tuning.recorder import Changes, Convergence, Graphs, Magnitudes, Recorder
from tgate_compile.study.tuning.request import Runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphCosts:
    """Multiply-accumulates of one denoiser's graphs, in linear and convolution layers (the paper's convention).

    Attributes:
        per_row: multiply-accumulates per row of the batch, by phase name.
        guided: batch size of a call with guidance.
        unguided: batch size of a call without guidance.
    """

    per_row: Mapping[str, float]
    guided: int
    unguided: int

    @classmethod
    def of(cls, hook: GatedDenoiser) -> GraphCosts:
        """Count the graphs that `hook` has made so far, which must all be for images of one shape."""
        per_row: dict[str, float] = {}
        counted: dict[Phase, float] = {}
        batches = set()
        for variant, captured in hook.store.variants:
            graph = variant.program.graph
            # Not of the variant's graph: a part of a step may not take the latents.
            latents = next(node for node in captured.program.graph.nodes if node.name == captured.latents)
            batch = latents.meta["val"].shape[0]
            counted[variant.phase] = per_row[variant.phase.name] = count_macs(graph).layers / batch
            batches.add(batch)
        for phase, head in counted.items():
            for part in ("tail", "finish") if phase.part == "head" else ():
                if phase.of_part(part) in counted:
                    settled = phase.settled(skipped=part == "finish")
                    per_row.setdefault(settled.name, head + counted[phase.of_part(part)])
        return cls(per_row, max(batches), min(batches))

    def macs_of(self, calls: Iterable[Phase]) -> float:
        """Return the multiply-accumulates of the given denoiser calls."""
        return sum(self.per_row[phase.name] * (self.guided if phase.guided else self.unguided) for phase in calls)


MSG_NOT_FINITE = (
    "The plain pipeline's own latents are not finite, so nothing can be compared with them. "
    "Check that the pipeline makes images without tgate_compile; if it is in fp16, try bf16 or fp32."
)


@dataclass(frozen=True)
class Plain:
    """Measurements of the plain pipeline over all images.

    Attributes:
        latents: final latents of each generation, [images, ...], float32 on the CPU.
        rows: sum of the batch sizes of all calls, by denoiser.
        num_steps: steps of a generation (with two denoisers, of the one that runs more).
        seconds: time of each generation after the first, which warms up.
        convergence: convergence of the cross-attentions.
    """

    latents: tuple[torch.Tensor, ...]
    rows: Mapping[str, int]
    num_steps: int
    seconds: tuple[float, ...]
    convergence: Convergence


@dataclass(frozen=True)
class Measured:
    """Measurements of a schedule over all images.

    Attributes:
        strip: strip of the last generation.
        macs: multiply-accumulates of all denoiser calls, in linear and convolution layers.
        drifts: drift of each image; see `relative_distances`.
        seconds: time of each generation after the first.
    """

    strip: str
    macs: float
    drifts: tuple[float, ...]
    seconds: tuple[float, ...]


class Bench:
    """Run the same generations under different schedules.

    Args:
        pipe: the pipeline.
        denoisers: the pipeline's denoisers, by component name.
        calls: arguments of each generation, without the noise.
        seeds: seeds of the noise; each call is made once per seed.
        on_run: called after each generation.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoisers: Mapping[str, torch.nn.Module],
        calls: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        on_run: Callable[[], None],
    ) -> None:
        self._pipe = pipe
        self._denoisers = denoisers
        self._runs = [(call, seed) for call in calls for seed in seeds]
        self._on_run = on_run

    def run_plain(self, *, changes_too: bool = True, **override: Any) -> Plain:
        """Run the plain pipeline, with the arguments in `override` added to each call.

        With `changes_too`, also record the changes of the attention outputs. That slows the pipeline down, so `seconds`
        are then longer than those of an undisturbed run.
        """
        latents: list[torch.Tensor] = []
        seconds: list[float] = []
        rows: dict[str, int] = defaultdict(int)
        changes: dict[int, list[float]] = defaultdict(list)
        num_steps, graphs = 0, Graphs()
        for call, seed in self._runs:
            recorder = Recorder(
                self._pipe,
                lambda: bool(getattr(self._pipe, "do_classifier_free_guidance", False)),
                kinds=frozenset({"cross"}) if changes_too else frozenset(),
                graphs=graphs,
            )
            with recorder.recording(self._denoisers):
                result, took = self._run({**call, **override}, seed)
            if not result.isfinite().all():
                raise ConfigurationError(MSG_NOT_FINITE)
            latents.append(result)
            seconds.append(took - recorder.seconds)
            for name, of_denoiser in recorder.rows.items():
                rows[name] += of_denoiser
            for step, of_step in recorder.changes.items():
                changes[step] += of_step
            num_steps = max(num_steps, *map(len, recorder.steps.values()))
        return Plain(tuple(latents), rows, num_steps, tuple(seconds[1:]), Convergence.of(changes))

    def time_plain(self) -> list[float]:
        """Return the seconds of each generation of the plain pipeline, which must already be warm."""
        return [self._run(call, seed)[1] for call, seed in self._runs]

    def run_gated(self, schedule: Schedule, plain: Plain) -> Measured:
        """Run the optimized pipeline with `schedule` instead of the schedule that it was optimized with.

        The graphs are derived from the existing capture, so `schedule` must not cache further kinds of sites or merge
        the halves differently.
        """
        state = required_state_of(self._pipe)
        keep = family_of(state.pipeline_class).only or schedule.keep
        schedule = dataclasses.replace(schedule, keep=keep)
        for hook in state.hooks.values():
            fitting = with_possible_half(self._pipe, hook.denoiser, schedule)
            hook.config = dataclasses.replace(hook.config, schedule=fitting)
        drifts: list[float] = []
        seconds: list[float] = []
        steps: dict[str, list[Phase]] = defaultdict(list)
        for (call, seed), reference in zip(self._runs, plain.latents, strict=True):
            result, took = self._run(call, seed)
            drifts += relative_distances(result, reference)
            seconds.append(took)
            for name, hook in state.hooks.items():
                steps[name] += [phase for _, phase in hook.last.steps] if hook.last is not None else []
        strip = "|".join(strip_of(hook.last.steps) for hook in state.hooks.values() if hook.last is not None)
        macs = sum(GraphCosts.of(hook).macs_of(steps[name]) for name, hook in state.hooks.items() if steps[name])
        return Measured(strip, macs, tuple(drifts), tuple(seconds[1:]))

    def macs_of(self, plain: Plain) -> float:
        """Return the multiply-accumulates of the plain pipeline, from the full graphs; call it after `run_gated`."""
        hooks = required_state_of(self._pipe).hooks
        return sum(rows * GraphCosts.of(hooks[name]).per_row["full"] for name, rows in plain.rows.items())

    def magnitude_ratios(self) -> tuple[float, ...]:
        """Return the ratios of MagCache, measured in the first generation of the plain pipeline."""
        (denoiser,) = self._denoisers.values()
        ratios = magnitude_ratios(self._pipe, denoiser, *self._runs[0])
        self._on_run()
        return ratios

    def _run(self, call: Mapping[str, Any], seed: int) -> tuple[torch.Tensor, float]:
        """Run one generation; return its final latents, [images, ...], in float32 on the CPU, and its seconds."""
        began = time.perf_counter()
        latents = final_latents(self._pipe, call, seed)
        took = time.perf_counter() - began
        self._on_run()
        return latents, took


def final_latents(pipe: DiffusionPipeline, call: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Return the final latents of one generation, [images, ...], in float32 on the CPU.

    Raises:
        ConfigurationError: the pipeline does not return latents.
    """
    # Noise from the CPU is the same on every device.
    generator = torch.Generator().manual_seed(seed)
    result = pipe(**call, generator=generator, output_type="latent", return_dict=False)[0]
    if not torch.is_tensor(result):
        given = f"a {type(result).__name__}"
        raise ConfigurationError(
            f"Schedules are compared by the final latents, but {type(pipe).__name__} returns {given} for "
            'output_type="latent". Choose the gate step by looking at the images instead.'
        )
    return result.detach().to("cpu", torch.float32)


def relative_distances(latents: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Return ||x - r|| / ||r|| for each image's latents, [images, ...]; infinite where x is not finite."""
    distances = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return [distance if math.isfinite(distance) else math.inf for distance in distances.tolist()]


@contextmanager
def silent(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hide the pipeline's progress bar, which would appear for each of many generations."""
    if not hasattr(pipe, "set_progress_bar_config"):  # a custom pipeline
        yield
        return
    before = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


MSG_NOT_CALIBRATED = (
    "The ratios of {model} cannot be measured: the change that its blocks make is zero or not finite at a step, or its "
    "shape changes from step to step. The ratios are {ratios}."
)


def magnitude_ratios(
    pipe: DiffusionPipeline, denoiser: torch.nn.Module, call: Mapping[str, Any], seed: int, *, front: int = 0
) -> tuple[float, ...]:
    """Return the ratios of MagCache for `denoiser`, measured in one generation of the plain pipeline.

    Raises:
        UnsupportedModelError: its graph has no stack of blocks whose residual can be cached, or the ratios are not
            finite.
    """
    magnitudes = Magnitudes(pipe, _guided(pipe, call), denoiser, Blocks(front))
    with magnitudes.recording():
        final_latents(pipe, call, seed)
    ratios = magnitudes.ratios
    if not all(map(math.isfinite, ratios)):
        raise UnsupportedModelError(MSG_NOT_CALIBRATED.format(model=type(denoiser).__name__, ratios=list(ratios)))
    return ratios


def _guided(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Callable[[], bool]:
    """Return a function that reports whether guidance is on, during the pipeline's call with these arguments."""
    bound = inspect.signature(type(pipe).__call__).bind_partial(pipe, **call)
    bound.apply_defaults()
    return guidance_of(pipe, bound.arguments)


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
    calls = [(each, seed) for each in runs.calls(pipe) for seed in runs.seeds]
    measured = []
    with silent(pipe):
        for number, (each, seed) in enumerate(calls, 1):
            measured.append(magnitude_ratios(pipe, getattr(pipe, name), each, seed, front=method.front))
            if progress is not None:
                progress(number, len(calls), "calibration of MagCache")
    means = [math.fsum(of_step) / len(measured) for of_step in zip(*measured, strict=True)]
    return dataclasses.replace(method, ratios=tuple(means))


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
    calls = [(each, seed) for each in runs.calls(pipe) for seed in runs.seeds]
    wanted = [value for value in get_args(ValueOfBlocks) if value == measured or (not measured and value != "residual")]
    recorded: dict[str, list[Sequence[Series]]] = defaultdict(list)
    changes = Changes(pipe, getattr(pipe, name), wanted)
    with silent(pipe):
        for number, (each, seed) in enumerate(calls, 1):
            with changes.recording(_guided(pipe, each)):
                final_latents(pipe, each, seed)
            for value, series in changes.series.items():
                recorded[value].append(series)
            if progress is not None:
                progress(number, len(calls), "calibration of TeaCache")
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
