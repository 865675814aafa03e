"""`tune`: propose schedules, measure them, and choose one."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._arguments import AnyPipeline, BackendName, check_pipeline_first
from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.capture import denies_cross_attention
from tgate_compile.engine.families import has_joint_attention
from tgate_compile.methods.method import Method, methods
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.pipeline.attach import attach, denoiser_names, detach
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.timings import MOST_GAIN, MOST_GAIN_OF_BACKEND, why_unreliable
from tgate_compile.study.tuning import DEFAULT_TOLERANCE
from tgate_compile.study.tuning.measure import Bench, Measured, Plain, relative_distances, silent
from tgate_compile.study.tuning.request import Request, setting_of
from tgate_compile.study.tuning.result import Row, Tuning

#: Where the gates of the grid lie, as fractions of the steps; the paper's gate is at 0.4.
GRID = (0.12, 0.24, 0.4, 0.6, 0.8)
#: The number of steps of the baseline "fewer steps", as fractions of the steps; schedulers of several stages need some.
FEWER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_STEPS = 4
#: T-GATE v2's interval, as in the paper.
SP_INTERVAL = 5


@dataclass(frozen=True)
class Family:
    """Schedules that differ in one number, along which the images drift less and less from the plain pipeline's.

    Attributes:
        name: in tables and plots.
        schedule: from the gate (or another end of the expensive steps) to the schedule.
    """

    name: str
    schedule: Callable[[int], Schedule]


TGATE = Family("T-GATE", lambda gate: Schedule(gate))
#: With the prompt's own half in the caches, not the mean of the halves.
TGATE_COND = Family("T-GATE, cond cached", lambda gate: Schedule(gate, anchor_weight=1.0))
TGATE_V2 = Family("T-GATE v2", lambda gate: Schedule(gate, sp_interval=SP_INTERVAL))
GUIDANCE_DROP = Family("guidance drop", lambda gate: Schedule(None, guidance_step=gate))


def grid_of(num_steps: int) -> list[int]:
    """The gates to begin with."""
    return sorted({gate for fraction in GRID if 0 < (gate := round(fraction * num_steps)) < num_steps})


def next_gate(within: dict[int, bool], num_steps: int) -> int | None:
    """The gate to try next, given which gates are within the tolerance: halfway between the last that is not and the
    first that is. None if there is nothing in between.

    A gate of 0 is taken not to be, and one at the last step, which never gates, to be.
    """
    first = min((gate for gate, is_within in within.items() if is_within), default=num_steps)
    last = max((gate for gate, is_within in within.items() if not is_within and gate < first), default=0)
    return (first + last) // 2 if first - last > 1 else None


def fewer_steps(num_steps: int) -> Sequence[int]:
    """The numbers of steps of the baseline."""
    return sorted({steps for fraction in FEWER if LEAST_STEPS <= (steps := round(fraction * num_steps)) < num_steps})


def effect_of(schedule: Schedule, num_steps: int) -> Hashable:
    """What tells the images of one schedule from another's. What is reused is always what was computed last, so that
    the steps that reuse it say all."""
    steps = tuple((phase.guided, phase.reuse) for phase in schedule.plan(num_steps, guided=True))
    weights = (schedule.anchor_weight, schedule.deepcache_branch)
    return (steps, schedule.guidance_similarity, schedule.kept, weights)


logger = logging.getLogger(__name__)

#: Puts a schedule on a plain pipeline; at the end it is plain again.
Gated = Callable[[DiffusionPipeline, Schedule], AbstractContextManager[Any]]
#: Called after each generation: how many are done, how many there will be as far as is known, and what was measured.
Progress = Callable[[int, int, str], None]


def search(
    pipe: DiffusionPipeline, request: Request, gated: Gated, *, backend: str, progress: Progress | None = None
) -> Tuning:
    """What `tune` does, with `gated` to put schedules on the pipeline, which is plain before and after.

    Raises:
        ConfigurationError: the request does not suit the pipeline, or no schedule is within the tolerance.
        UnsupportedModelError: the pipeline takes none of the schedules.
    """
    given = request.candidates
    carriers = [carrier for carrier, _ in _sharing_a_capture(given)] if given else [GUIDANCE_DROP.schedule(1)]
    denoisers: dict[str, torch.nn.Module] = {}
    for carrier in carriers:
        with gated(pipe, carrier):  # refuses what can be refused before any work
            denoisers = {name: hook.denoiser for name, hook in required_state_of(pipe).hooks.items()}
    return _Search(pipe, request, gated, denoisers, progress).run(backend)


class _Search:
    def __init__(
        self,
        pipe: DiffusionPipeline,
        request: Request,
        gated: Gated,
        denoisers: Mapping[str, torch.nn.Module],
        progress: Progress | None,
    ) -> None:
        self._pipe = pipe
        self._request = request
        self._gated = gated
        self._denoisers = denoisers
        self._progress = progress
        calls = request.calls(pipe)
        self._images = len(calls) * len(request.seeds)
        self._bench = Bench(pipe, denoisers, calls, request.seeds, self._count)
        self._done = 0
        self._planned = 0
        self._doing = ""
        self._rows: list[Row] = []
        self._seconds: dict[str, tuple[float, ...]] = {}  # by the row's label
        self._plain_seconds: list[float] = []
        self._measured: dict[Hashable, Row] = {}  # by their effect: what does the same is measured once

    def run(self, backend: str) -> Tuning:
        """Measure everything, and choose."""
        request = self._request
        baseline = self._numbers_of_steps()
        # The plain pipeline is timed before and after the others, if these have more than their first generation.
        timed = self._images > 1
        self._plan(1 + 2 * timed + len(baseline))
        with silent(self._pipe):
            self._doing = "plain"
            plain = self._bench.run_plain()
            if plain.num_steps < 2:
                raise ConfigurationError(
                    f"The call makes {plain.num_steps} of {request.num_inference_steps} steps, and at least 2 "
                    "are needed to gate any. Give more num_inference_steps, or a larger strength."
                )
            if timed:
                self._plain_seconds += self._bench.time_plain()
            if request.candidates is not None:
                self._measure_given(request.candidates, plain)
            else:
                self._measure_families(plain)
            self._measure_fewer_steps(baseline, plain)
            if timed:
                self._doing = "plain"
                self._plain_seconds += self._bench.time_plain()
        self._rows = [self._with_time(row, backend) for row in self._rows]
        return Tuning(
            schedule=self._choose(plain),
            table=tuple(sorted(self._rows, key=lambda row: (row.cost, row.drift))),
            convergence=plain.convergence,
            tolerance=float(request.tolerance),
            num_inference_steps=request.num_inference_steps,
            num_steps=plain.num_steps,
            prompts=tuple(request.prompts or ()),
            seeds=tuple(request.seeds),
            call=request.described_call(),
            setting=setting_of(self._pipe, self._denoisers) | {"backend": backend},
        )

    def _measure_given(self, candidates: Sequence[Schedule], plain: Plain) -> None:
        self._plan(len(set(candidates)))
        for carrier, group in _sharing_a_capture(candidates):
            with self._gated(self._pipe, carrier):
                for schedule in group:
                    self._measure("given", schedule, plain)

    def _measure_families(self, plain: Plain) -> None:
        no_cross = any(
            has_joint_attention(type(denoiser)) or denies_cross_attention(denoiser)
            for denoiser in self._denoisers.values()
        )
        grid = grid_of(plain.num_steps)
        self._plan((1 if no_cross else 4) * len(grid))
        if no_cross:
            self._measure_along((GUIDANCE_DROP,), grid, plain)
            self._measure_methods(plain)
            return
        try:
            self._measure_along((TGATE, GUIDANCE_DROP, TGATE_V2), grid, plain)
        except UnsupportedModelError:
            if self._rows:
                raise
            logger.info("no self-attention that could be cached: leaving %s out", TGATE_V2.name)
            self._plan(-len(grid))
            self._measure_along((TGATE, GUIDANCE_DROP), grid, plain)
        self._measure_along((TGATE_COND,), grid, plain)
        self._measure_methods(plain)

    def _measure_methods(self, plain: Plain) -> None:
        """The settings that each method proposes by itself."""
        for kind in methods().values():
            for carrier, group in _sharing_a_capture([schedule_of(method) for method in kind.candidates()]):
                self._plan(len(group))
                try:
                    with self._gated(self._pipe, carrier):
                        for schedule in group:
                            self._measure(kind.title, schedule, plain)
                except UnsupportedModelError as error:
                    logger.info("leaving %s out: %s", carrier, error)
                    self._plan(-len(group))

    def _measure_along(self, families: Sequence[Family], grid: Sequence[int], plain: Plain) -> None:
        """The grid of each family, then more of it until the tolerance lies between neighbours, or nothing is gained.

        Their graphs are made of one capture.
        """
        carrier = max((family.schedule(1) for family in families), key=lambda schedule: len(schedule.kinds))
        with self._gated(self._pipe, carrier):
            for family in families:
                if family is GUIDANCE_DROP and self._rows and self._rows[0].strip.islower():
                    self._plan(-len(grid))
                    continue  # there is no guidance that could be dropped
                rows = {gate: self._measure(family.name, family.schedule(gate), plain) for gate in grid}
                while (gate := next_gate({g: row.within for g, row in rows.items()}, plain.num_steps)) is not None:
                    best = min((row.cost for row in self._rows if row.within and row.schedule is not None), default=1.0)
                    if any(row.cost > best for earlier, row in rows.items() if earlier < gate):
                        break  # a later gate costs more than an earlier one
                    self._plan(1)
                    rows[gate] = self._measure(family.name, family.schedule(gate), plain)

    def _measure(self, family: str, schedule: Schedule, plain: Plain) -> Row:
        effect = effect_of(schedule, plain.num_steps)
        if effect in self._measured:
            self._plan(-1)
            return self._measured[effect]
        self._doing = str(schedule)
        measured = self._bench.run_gated(schedule, plain)
        cost = measured.macs / self._bench.macs_of(plain)
        row = self._measured[effect] = self._row(family, str(schedule), schedule, measured, cost)
        return row

    def _numbers_of_steps(self) -> Sequence[int]:
        """Those of the baseline, none if the call says itself which steps there are."""
        request = self._request
        own = "timesteps" in request.call or "sigmas" in request.call
        return [] if own else fewer_steps(request.num_inference_steps)

    def _measure_fewer_steps(self, numbers: Sequence[int], plain: Plain) -> None:
        for steps in numbers:
            if steps * plain.num_steps < self._request.num_inference_steps:
                self._plan(-1)
                continue  # with `strength < 1` not a single one would be left of them
            self._doing = f"{steps} steps"
            fewer = self._bench.run_plain(changes_too=False, num_inference_steps=steps)
            drifts = [
                drift
                for latents, reference in zip(fewer.latents, plain.latents, strict=True)
                for drift in relative_distances(latents, reference)
            ]
            measured = Measured("F" * fewer.num_steps, 0.0, tuple(drifts), fewer.seconds)
            cost = sum(fewer.rows.values()) / sum(plain.rows.values())
            self._row("fewer steps", self._doing, None, measured, cost)

    def _row(self, family: str, label: str, schedule: Schedule | None, measured: Measured, cost: float) -> Row:
        drift = statistics.fmean(measured.drifts)
        row = Row(
            family=family,
            label=label,
            schedule=schedule,
            strip=measured.strip,
            cost=cost,
            drift=drift,
            spread=statistics.pstdev(measured.drifts, drift) if drift < float("inf") else drift,
            worst=max(measured.drifts),
            within=drift <= self._request.tolerance,
            time=None,
        )
        self._seconds[label] = measured.seconds
        logger.info("%s: cost %.3f, drift %.3f (%.3f at worst), %s", label, cost, drift, row.worst, row.strip)
        self._rows.append(row)
        return row

    def _with_time(self, row: Row, backend: str) -> Row:
        """`row` with its time, as a share of the plain pipeline's, or with why that cannot be told."""
        seconds = self._seconds[row.label]
        if not seconds:
            return row
        time = statistics.median(seconds) / statistics.median(self._plain_seconds)
        unreliable = why_unreliable(
            seconds,
            self._plain_seconds,
            speedup=1 / time,
            cost=row.cost,
            most_gain=MOST_GAIN if backend == "eager" or row.schedule is None else MOST_GAIN_OF_BACKEND,
        )
        return dataclasses.replace(row, time=None if unreliable else time, unreliable=unreliable)

    def _choose(self, plain: Plain) -> Schedule:
        rows = [row for row in self._rows if row.schedule is not None]
        saving = [row for row in rows if row.saves]
        if not saving:
            cheapest = min(rows, key=lambda row: row.cost)
            raise ConfigurationError(
                f"None of the schedules costs less than the plain pipeline, in {plain.num_steps} steps. The "
                f"cheapest is {cheapest.label}, at {cheapest.cost:.3f} of the operations."
            )
        within = [row for row in saving if row.within]
        if not within:
            closest = min(saving, key=lambda row: (row.drift, row.cost))
            raise ConfigurationError(
                f"No schedule stays within tolerance={self._request.tolerance:g} of the plain pipeline on these "
                f"prompts. The closest is {closest.label}, with drift {closest.drift:.3f} at {closest.cost:.3f} "
                "of the operations. Give a larger tolerance, or leave the pipeline plain."
            )
        chosen = min(within, key=lambda row: (row.cost, row.drift)).schedule
        assert chosen is not None
        return chosen

    def _plan(self, contenders: int) -> None:
        self._planned += contenders * self._images

    def _count(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._planned, self._doing)


def _sharing_a_capture(schedules: Sequence[Schedule]) -> Iterator[tuple[Schedule, list[Schedule]]]:
    """Groups of schedules whose graphs can be made of the same capture, each with one that needs all of its sites."""
    groups: dict[Hashable, list[Schedule]] = {}
    for schedule in dict.fromkeys(schedules):
        is_deep = "deep" in schedule.kinds
        # A capture that has self-attention's sites has them in one kind or in two; and it has what its carrier needs.
        apart = ("temporal" in schedule.kinds, bool(schedule.kinds) and "cross" not in schedule.kinds)
        key = (is_deep, schedule.deepcache_branch if is_deep else None, schedule.anchor_weight, apart)
        groups.setdefault(key, []).append(schedule)
    for group in groups.values():
        yield max(group, key=lambda schedule: len(schedule.kinds)), group


def _as_schedules(given: Any) -> Any:
    """Return candidates with their methods as schedules; what is neither is left to the request's check."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return given
    return [schedule_of(one) if isinstance(one, Method) else one for one in given]


def tune(
    pipe: AnyPipeline,
    prompts: Sequence[str] | None = None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    num_inference_steps: int = 25,
    candidates: Sequence[Schedule | Method] | None = None,
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    backend: BackendName = "eager",
    progress: Progress | None = None,
) -> Tuning:
    """Measure what schedules cost and how far they take the images from the plain pipeline's; choose the cheapest.

    Each prompt is run once as it is and once with every candidate, from the same noise. Drift is
    ||x - plain x|| / ||plain x|| of the final latents; cost is counted in multiply-accumulates of the denoiser.
    The schedule chosen is the one of the least cost whose mean drift is within `tolerance`. `docs/guides/tuning.md`
    says what drifts are like, and how the default came about.

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
    check_pipeline_first("tune", pipe, prompts)
    check_ordinary(pipe, "tune()")

    @contextmanager
    def gated(pipe: DiffusionPipeline, schedule: Schedule) -> Iterator[None]:
        attach(pipe, dict.fromkeys(denoiser_names(pipe, denoiser), schedule), backend=backend)
        try:
            yield
        finally:
            detach(pipe)

    request = Request(
        prompts, num_inference_steps, seeds, {} if call is None else call, "tune", tolerance, _as_schedules(candidates)
    )
    return search(pipe, request, gated, backend=backend, progress=progress)
