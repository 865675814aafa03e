"""Measure schedules: their images' drift from the plain pipeline's, and their cost. Measure the ratios of MagCache."""

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
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.families import family_of
from tgate_compile.methods.method import Blocks, Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.pipeline.attach import with_possible_half
from tgate_compile.pipeline.decisions import strip_of
from tgate_compile.pipeline.facts import guidance_of
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.tuning.recorder import Convergence, Graphs, Magnitudes, Recorder

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
    magnitudes = Magnitudes(pipe, guided(pipe, call), denoiser, Blocks(front))
    with magnitudes.recording():
        final_latents(pipe, call, seed)
    ratios = magnitudes.ratios
    if not all(map(math.isfinite, ratios)):
        raise UnsupportedModelError(MSG_NOT_CALIBRATED.format(model=type(denoiser).__name__, ratios=list(ratios)))
    return ratios


def guided(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Callable[[], bool]:
    """Return a function that reports whether guidance is on, during the pipeline's call with these arguments."""
    bound = inspect.signature(type(pipe).__call__).bind_partial(pipe, **call)
    bound.apply_defaults()
    return guidance_of(pipe, bound.arguments)
