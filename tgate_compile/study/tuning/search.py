"""`tune`: propose schedules, measure them, and choose one."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import (
    BackendName,
    CaptureError,
    ConfigurationError,
    Precision,
    UnsupportedModelError,
    check_pipeline_first,
)
from tgate_compile.engine.capture import denies_cross_attention
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.engine.families import has_joint_attention
from tgate_compile.methods.mag_cache import MagCache
from tgate_compile.methods.method import Method, methods
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.pipeline.attach import attached, denoiser_names
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.bench.result import MOST_GAIN, MOST_GAIN_OF_BACKEND, why_unreliable
from tgate_compile.study.tuning import DEFAULT_TOLERANCE
from tgate_compile.study.tuning.measure import Bench, Measured, Plain, relative_distances, silent
from tgate_compile.study.tuning.plans import (
    GUIDANCE_DROP,
    TGATE,
    TGATE_COND,
    TGATE_V2,
    PlanSearch,
    Sweep,
    families,
    fewer_steps,
    grid_of,
    next_gate,
)
from tgate_compile.study.tuning.request import Request, setting_of
from tgate_compile.study.tuning.result import Tuning, TuningRow


def effect_of(schedule: Schedule, num_steps: int) -> Hashable:
    """Return a key that is equal for schedules that give the same images.

    Reused values are those computed last, or a forecast from them, so it is enough to know which steps reuse what, and
    the rule of steps that are decided at run time.
    """
    plan = schedule.plan(num_steps, guided=True)
    steps = tuple((phase.guided, phase.estimated, phase.reuse, phase.decided) for phase in plan)
    weights = (schedule.anchor_weight, schedule.deepcache_branch)
    values = (schedule.ranges, tuple(sorted(schedule.forecasts.items())), schedule.estimating, schedule.rule)
    return (steps, schedule.guidance_similarity, schedule.kept, weights, values)


logger = logging.getLogger(__name__)

#: Called after each generation: how many are done, how many there will be as far as is known, and what was measured.
Progress = Callable[[int, int, str], None]


def search(
    pipe: DiffusionPipeline,
    request: Request,
    *,
    denoiser: str | None,
    backend: str,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Tuning:
    """Do the work of `tune`: apply schedules to the plain pipeline, measure them, and choose one.

    Raises:
        ConfigurationError: the request does not suit the pipeline, or no schedule is within the tolerance.
        UnsupportedModelError: the pipeline supports none of the schedules.
    """
    given = request.candidates
    carriers = [carrier for carrier, _ in _sharing_a_capture(given)] if given else [GUIDANCE_DROP.schedule(1)]
    denoisers: dict[str, torch.nn.Module] = {}
    for carrier in carriers:
        names = denoiser_names(pipe, denoiser)
        with attached(pipe, carrier, names, backend=backend, precision=precision):  # report errors before any work
            denoisers = {name: hook.denoiser for name, hook in required_state_of(pipe).hooks.items()}
    return _Search(pipe, request, denoisers, backend, precision, progress).run()


class _Search:
    def __init__(
        self,
        pipe: DiffusionPipeline,
        request: Request,
        denoisers: Mapping[str, torch.nn.Module],
        backend: str,
        precision: str,
        progress: Progress | None,
    ) -> None:
        self._pipe = pipe
        self._request = request
        self._backend = backend
        self._precision = precision
        self._denoisers = denoisers
        self._progress = progress
        calls = request.calls(pipe)
        self._images = len(calls) * len(request.seeds)
        self._bench = Bench(pipe, denoisers, calls, request.seeds, self._count)
        self._done = 0
        self._planned = 0
        self._doing = ""
        self._rows: list[TuningRow] = []
        self._seconds: dict[str, tuple[float, ...]] = {}  # by the row's label
        self._plain_seconds: list[float] = []
        self._measured: dict[Hashable, TuningRow] = {}  # by effect, so that equivalent schedules are measured once

    def run(self) -> Tuning:
        """Measure everything, and choose."""
        request = self._request
        baseline = self._numbers_of_steps()
        # Time the plain pipeline before and after the others, if there are generations beyond the first.
        timed = self._images > 1
        self._plan(1 + 2 * timed + len(baseline))
        with silent(self._pipe):
            self._doing = "plain"
            plain = self._bench.run_plain()
            if plain.num_steps < 2:
                raise ConfigurationError(
                    f"The call makes {plain.num_steps} of {request.num_inference_steps} steps, but gating needs at "
                    "least 2. Increase num_inference_steps or strength."
                )
            if timed:
                self._plain_seconds += self._bench.time_plain()
            if request.candidates is not None:
                self._measure_given(request.candidates, plain)
            else:
                self._measure_sweeps(plain)
                if request.budget is not None:
                    self._measure_plans(request.budget, plain)
            self._measure_fewer_steps(baseline, plain)
            if timed:
                self._doing = "plain"
                self._plain_seconds += self._bench.time_plain()
        self._rows = [self._with_time(row, self._backend) for row in self._rows]
        return Tuning(
            schedule=self._choose(plain),
            table=tuple(sorted(self._rows, key=lambda row: (row.cost, row.drift))),
            convergence=plain.convergence,
            tolerance=float(request.tolerance) if request.budget is None else None,
            budget=request.budget,
            num_inference_steps=request.num_inference_steps,
            num_steps=plain.num_steps,
            prompts=tuple(request.prompts or ()),
            seeds=tuple(request.seeds),
            call=request.described_call(),
            setting=setting_of(self._pipe, self._denoisers) | {"backend": self._backend, "precision": self._precision},
        )

    def _measure_given(self, candidates: Sequence[Schedule], plain: Plain) -> None:
        self._plan(len(set(candidates)))
        for carrier, group in _sharing_a_capture(candidates):
            with attached(
                self._pipe, carrier, tuple(self._denoisers), backend=self._backend, precision=self._precision
            ):
                for schedule in group:
                    self._measure("given", schedule, plain)

    def _measure_sweeps(self, plain: Plain) -> None:
        is_joint = any(has_joint_attention(type(denoiser)) for denoiser in self._denoisers.values())
        no_cross = not is_joint and any(map(denies_cross_attention, self._denoisers.values()))
        grid = grid_of(plain.num_steps)
        self._plan((1 if no_cross else 2 if is_joint else 4) * len(grid))
        if is_joint:
            self._measure_joint(grid, plain)
            self._measure_mag_cache(plain)
            return
        if no_cross:
            self._measure_along((GUIDANCE_DROP,), grid, plain)
            self._measure_methods(plain)
            self._measure_mag_cache(plain)
            return
        try:
            self._measure_along((TGATE, GUIDANCE_DROP, TGATE_V2), grid, plain)
        except UnsupportedModelError:
            if self._rows:
                raise
            logger.info("skipping %s: the denoiser has no self-attention that can be cached", TGATE_V2.name)
            self._plan(-len(grid))
            self._measure_along((TGATE, GUIDANCE_DROP), grid, plain)
        self._measure_along((TGATE_COND,), grid, plain)
        self._measure_methods(plain)
        self._measure_mag_cache(plain)

    def _measure_joint(self, grid: Sequence[int], plain: Plain) -> None:
        """Measure schedules for joint attention, where only the text's keys and values can be cached."""
        try:
            self._measure_along((TGATE, GUIDANCE_DROP), grid, plain)
        except UnsupportedModelError as error:
            if self._rows:
                raise
            logger.info("skipping %s: %s", TGATE.name, error)
            self._plan(-len(grid))
            self._measure_along((GUIDANCE_DROP,), grid, plain)
        self._measure_methods(plain)

    def _measure_methods(self, plain: Plain) -> None:
        """Measure the candidates that each method proposes."""
        for kind in methods().values():
            for carrier, group in _sharing_a_capture([schedule_of(method) for method in kind.candidates()]):
                self._plan(len(group))
                try:
                    with attached(
                        self._pipe, carrier, tuple(self._denoisers), backend=self._backend, precision=self._precision
                    ):
                        for schedule in group:
                            self._measure(kind.title, schedule, plain)
                except UnsupportedModelError as error:
                    logger.info("skipping %s: %s", carrier, error)
                    self._plan(-len(group))

    def _measure_mag_cache(self, plain: Plain) -> None:
        """Measure MagCache with ratios from a further generation of the plain pipeline.

        Its rule is about one stack of blocks, so UNets are left out.
        """
        denoisers = tuple(self._denoisers.values())
        if len(denoisers) > 1 or hasattr(denoisers[0], "up_blocks"):
            return
        self._planned += 1
        self._doing = "calibration of MagCache"
        try:
            ratios = self._bench.magnitude_ratios()
        except (UnsupportedModelError, CaptureError) as error:
            logger.info("skipping MagCache: %s", error)
            self._planned -= 1
            return
        group = [schedule_of(method) for method in MagCache(ratios).thresholds()]
        self._plan(len(group))
        with attached(self._pipe, group[0], tuple(self._denoisers), backend=self._backend, precision=self._precision):
            for schedule in group:
                self._measure(MagCache.title, schedule, plain)

    def _measure_plans(self, budget: float, plain: Plain) -> None:
        """Search for plans of steps within the budget; measure the best of each family."""
        if len(self._denoisers) > 1:
            logger.info("skipping plans of steps: the pipeline has several denoisers")
            return
        ((name, denoiser),) = self._denoisers.items()

        def begin(what: str) -> None:
            self._plan(1)
            self._doing = what

        options = {"backend": self._backend, "precision": self._precision}
        guided = not (self._rows and self._rows[0].strip.islower())
        is_joint = has_joint_attention(type(denoiser))
        chosen = families(
            plain.num_steps,
            guided=guided,
            gates=not is_joint and not denies_cross_attention(denoiser),
            blocks=not hasattr(denoiser, "up_blocks"),
        )
        search = PlanSearch(self._pipe, name, self._bench, plain, options, begin, guided=guided)
        for found in search.run(chosen, budget):
            self._row("plan of steps", str(found.schedule), found.schedule, found.measured, found.cost)

    def _measure_along(self, sweeps: Sequence[Sweep], grid: Sequence[int], plain: Plain) -> None:
        """Measure the grid of each sweep, then refine it around the tolerance while that can lower the cost.

        All graphs are derived from one capture.
        """
        carrier = max((sweep.schedule(1) for sweep in sweeps), key=lambda schedule: len(schedule.kinds))
        with attached(self._pipe, carrier, tuple(self._denoisers), backend=self._backend, precision=self._precision):
            for sweep in sweeps:
                if sweep is GUIDANCE_DROP and self._rows and self._rows[0].strip.islower():
                    self._plan(-len(grid))
                    continue  # the pipeline already runs without guidance
                rows = {gate: self._measure(sweep.name, sweep.schedule(gate), plain) for gate in grid}
                while self._request.budget is None and (
                    gate := next_gate({g: row.within for g, row in rows.items()}, plain.num_steps)
                ):
                    best = min((row.cost for row in self._rows if row.within and row.schedule is not None), default=1.0)
                    if any(row.cost > best for earlier, row in rows.items() if earlier < gate):
                        break  # a later gate costs more than an earlier one
                    self._plan(1)
                    rows[gate] = self._measure(sweep.name, sweep.schedule(gate), plain)

    def _measure(self, family: str, schedule: Schedule, plain: Plain) -> TuningRow:
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
        """Return the numbers of steps of the baseline; none if the call specifies its timesteps or sigmas."""
        request = self._request
        own = "timesteps" in request.call or "sigmas" in request.call
        return [] if own else fewer_steps(request.num_inference_steps)

    def _measure_fewer_steps(self, numbers: Sequence[int], plain: Plain) -> None:
        for steps in numbers:
            if steps * plain.num_steps < self._request.num_inference_steps:
                self._plan(-1)
                continue  # with `strength < 1` the call would make no step at all
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

    def _row(self, family: str, label: str, schedule: Schedule | None, measured: Measured, cost: float) -> TuningRow:
        drift = statistics.fmean(measured.drifts)
        row = TuningRow(
            family=family,
            label=label,
            schedule=schedule,
            strip=measured.strip,
            cost=cost,
            drift=drift,
            spread=statistics.pstdev(measured.drifts, drift) if drift < float("inf") else drift,
            worst=max(measured.drifts),
            within=drift <= self._request.tolerance if self._request.budget is None else cost <= self._request.budget,
            time=None,
        )
        self._seconds[label] = measured.seconds
        logger.info("%s: cost %.3f, drift %.3f (%.3f at worst), %s", label, cost, drift, row.worst, row.strip)
        self._rows.append(row)
        return row

    def _with_time(self, row: TuningRow, backend: str) -> TuningRow:
        """Return `row` with its time relative to the plain pipeline, or with the reason why it is unreliable."""
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
                f"None of the schedules costs less than the plain pipeline in {plain.num_steps} steps. The "
                f"cheapest is {cheapest.label}, at {cheapest.cost:.3f} of the operations."
            )
        within = [row for row in saving if row.within]
        if self._request.budget is not None:
            return _closest(saving, within, self._request.budget)
        if not within:
            closest = min(saving, key=lambda row: (row.drift, row.cost))
            raise ConfigurationError(
                f"No schedule stays within tolerance={self._request.tolerance:g} of the plain pipeline on these "
                f"prompts. The closest is {closest.label}, with drift {closest.drift:.3f} at {closest.cost:.3f} "
                "of the operations. Increase the tolerance, or use the plain pipeline."
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


def _closest(rows: Sequence[TuningRow], within: Sequence[TuningRow], budget: float) -> Schedule:
    """Return the schedule with the least drift of those within the budget."""
    if not within:
        cheapest = min(rows, key=lambda row: (row.cost, row.drift))
        raise ConfigurationError(
            f"No schedule costs at most budget={budget:g} of the plain pipeline's operations. The cheapest is "
            f"{cheapest.label}, at {cheapest.cost:.3f}. Increase the budget, or use fewer steps."
        )
    chosen = min(within, key=lambda row: (row.drift, row.cost)).schedule
    assert chosen is not None
    return chosen


def _sharing_a_capture(schedules: Sequence[Schedule]) -> Iterator[tuple[Schedule, list[Schedule]]]:
    """Yield groups of schedules that can share a capture, each with a member that needs all sites of the capture."""
    groups: dict[Hashable, list[Schedule]] = {}
    for schedule in dict.fromkeys(schedules):
        is_deep = "deep" in schedule.kinds
        # A capture treats spatial and temporal self-attention as one kind or as two; and it has only the sites that its
        # carrier needs.
        apart = (
            "temporal" in schedule.kinds,
            bool(schedule.kinds) and "cross" not in schedule.kinds,
            "ff" in schedule.kinds,
            schedule.ranges,
        )
        key = (is_deep, schedule.deepcache_branch if is_deep else None, schedule.anchor_weight, apart)
        groups.setdefault(key, []).append(schedule)
    for group in groups.values():
        yield max(group, key=lambda schedule: len(schedule.kinds)), group


def _as_schedules(given: Any) -> Any:
    """Return candidates with methods converted to schedules; anything else is left for `Request` to check."""
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
    precision: Precision = "auto",
    progress: Progress | None = None,
    budget: float | None = None,
) -> Tuning:
    """Measure cost and drift of several schedules, and choose the cheapest one within a tolerance.

    With a `budget`, choose the one with the least drift within that budget of operations instead, and also search for
    plans of steps: which steps compute the layers that FORA or a block cache reuses, with or without a forecast, and
    with or without an end of guidance or a gate.

    Each prompt is run once with the plain pipeline and once with every candidate, starting from the same noise. Drift
    is ||x - plain x|| / ||plain x|| of the final latents; cost is counted in multiply-accumulates of the denoiser.
    The chosen schedule has the lowest cost of all whose mean drift is at most `tolerance`. `docs/guides/tuning.md`
    explains typical drifts and the default tolerance.

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, even after an error.
        prompts: a few typical prompts; None if `call` contains prompt embeddings.
        tolerance: largest mean drift allowed, greater than 0.
        num_inference_steps: number of steps to tune the schedule for.
        candidates: schedules to choose from. By default: T-GATE v1, caching either the mean of both guidance halves or
            the prompt's half alone (`anchor_weight=1`); T-GATE v2 (`sp_interval=5`); as a baseline, guidance dropped
            with nothing cached. Each is tried at a few gates, and then at gates around the tolerance. The candidates
            that other methods propose are tried as well, and for transformers also MagCache, with ratios that are
            measured in a further generation of the first prompt. With a `budget` also plans of steps.
        seeds: seeds of the noise for each prompt.
        call: further arguments for the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`.
        backend: as for `optimize`. Drift and cost do not depend on it; `"eager"` needs no compilation.
        precision: as for `optimize`. Drift is measured from the plain pipeline, which keeps its own.
        progress: called after each generation with the number of generations done, the expected total, and a
            description of the schedule being measured.
        budget: instead of `tolerance`, the largest cost allowed, relative to the plain pipeline, such as 0.5. The
            search needs a few hundred generations for each prompt.

    Raises:
        ConfigurationError: an argument is invalid, or no candidate is within the tolerance or the budget; the message
            names the closest or the cheapest one.
        UnsupportedModelError: the pipeline cannot be optimized, or does not support one of the `candidates`.
    """
    check_pipeline_first("tune", pipe, prompts)
    check_ordinary(pipe, "tune()")

    request = Request(
        prompts,
        num_inference_steps,
        seeds,
        {} if call is None else call,
        "tune",
        tolerance,
        _as_schedules(candidates),
        budget,
    )
    return search(pipe, request, denoiser=denoiser, backend=backend, precision=precision, progress=progress)
