"""`analyze`: run a plain pipeline and measure when its attentions converge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import ConfigurationError, UnsupportedModelError, check_pipeline_first
from tgate_compile.engine.capture import MSG_NO_SITES
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.engine.families import family_of
from tgate_compile.methods.method import Kind
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.attach import attach, denoiser_names, detach
from tgate_compile.pipeline.facts import guidance_of
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.study.analysis import CONVERGED_WITHIN
from tgate_compile.study.analysis.measures import Collected, Curve, NullText, Tallies
from tgate_compile.study.analysis.result import Analysis, Trajectories
from tgate_compile.study.tuning.measure import MSG_NOT_FINITE, final_latents, relative_distances, silent
from tgate_compile.study.tuning.plans import grid_of
from tgate_compile.study.tuning.recorder import Graphs, Recorder
from tgate_compile.study.tuning.request import Runs, setting_of

if TYPE_CHECKING:
    from PIL.Image import Image


def suggested_gate(difference: Curve, converged_within: float) -> int | None:
    """Return the first step from which on the mean change stays close to its floor; None if it never does.

    "Close" means within a fraction `converged_within` of the range from the smallest to the largest change. A gate at
    step g caches the outputs of step g-1, so it ignores the changes at the steps g, g+1, and so on.

    Source: the discussion of figure 2 in arXiv 2404.02747 v1: the curve falls during the first 5 to 10 of 25 steps and
    is flat after that. The paper gives no rule. The floor is the smallest change rather than zero, because with long
    steps the change never comes close to zero.
    """
    if not difference.mean:
        return None
    floor, peak = min(difference.mean), max(difference.mean)
    limit = floor + converged_within * (peak - floor)
    gate = None
    for step, mean in zip(reversed(difference.steps), reversed(difference.mean), strict=True):
        if mean > limit:
            break
        gate = step
    return gate


#: Called after each generation with the number done, the expected total, and a description of what was run.
Progress = Callable[[int, int, str], None]

REMARK_NO_GUIDANCE = "No trajectories: without guidance the denoiser never receives the null text."
REMARK_NO_TEXT = "No trajectories: {pipeline} is not conditioned on text."
REMARK_NO_PICTURES = "No pictures: the pipeline does not return single images."


class Run:
    """Run the generations of one analysis.

    Args:
        pipe: a plain pipeline.
        denoisers: the pipeline's denoisers, by component name.
        runs: prompts, seeds and arguments.
        kinds: kinds of attention to record.
        switch_steps: values of m for the trajectories; None for a few spread over the steps.
        progress: see `Progress`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoisers: Mapping[str, torch.nn.Module],
        runs: Runs,
        *,
        kinds: Collection[Kind],
        switch_steps: Sequence[int] | None,
        progress: Progress | None,
    ) -> None:
        self._pipe = pipe
        self._denoisers = denoisers
        self._runs = runs
        self._kinds = kinds
        self._switch_steps = switch_steps
        self._progress = progress
        self._calls = [(call, seed) for call in runs.calls(pipe) for seed in runs.seeds]
        self._collected = Collected()
        self._graphs: Graphs = {}
        self._drifts = Tallies()
        self._pictures: dict[str, Image] = {}
        self._remarks: list[str] = []
        self._ways: list[tuple[str, int]] = []
        self._num_steps = 0
        self._done = 0

    def analyze(self, *, converged_within: float, pictures: bool) -> Analysis:
        """Do the work of `tgate_compile.analyze`."""
        with silent(self._pipe):
            for index, (call, seed) in enumerate(self._calls):
                self._run(call, seed, pictures=pictures and index == 0)
        kinds = self._collected.kinds
        trajectories = Trajectories(self._drifts.curve("F"), self._drifts.curve("L")) if self._ways else None
        return Analysis(
            kinds=kinds,
            trajectories=trajectories,
            gate=suggested_gate(kinds["cross"].difference, converged_within),
            converged_within=converged_within,
            num_inference_steps=self._runs.num_inference_steps,
            num_steps=self._num_steps,
            prompts=tuple(self._runs.prompts or ()),
            seeds=tuple(self._runs.seeds),
            call=self._runs.described_call(),
            setting=setting_of(self._pipe, self._denoisers),
            remarks=tuple(self._remarks),
            pictures=self._pictures,
        )

    def _run(self, call: Mapping[str, Any], seed: int, *, pictures: bool) -> None:
        bound = inspect.signature(type(self._pipe).__call__).bind_partial(self._pipe, **call)
        bound.apply_defaults()
        guided = guidance_of(self._pipe, bound.arguments)
        recorder = Recorder(self._pipe, guided, kinds=self._kinds, halves=True, graphs=self._graphs)
        null_text = NullText(self._pipe, guided)
        with recorder.recording(self._denoisers), null_text.learning(self._denoisers):
            plain = final_latents(self._pipe, call, seed)
        if not plain.isfinite().all():
            raise ConfigurationError(MSG_NOT_FINITE)
        if not any(sample.kind == "cross" for sample in recorder.samples):
            models = " and ".join(type(denoiser).__name__ for denoiser in self._denoisers.values())
            raise UnsupportedModelError(MSG_NO_SITES.format(model=models))
        self._collected.add(recorder.samples)
        if not self._done:
            steps: set[int] = set().union(*recorder.steps.values())
            self._num_steps = len(steps)
            self._plan_trajectories(has_null_text=any(sample.half == "uncond" for sample in recorder.samples))
        self._count("text in all steps")
        for way, m in self._ways:
            with null_text.replacing(self._denoisers, _when(way, m)):
                latents = final_latents(self._pipe, call, seed)
            for drift in relative_distances(latents, plain):
                self._drifts.add(way, m, drift)
            self._count(f"S^{way}_{m}")
        if pictures:
            self._draw(call, seed, null_text)

    def _plan_trajectories(self, *, has_null_text: bool) -> None:
        steps = self._num_steps
        switches = grid_of(steps) if self._switch_steps is None else list(self._switch_steps)
        if not all(0 <= m <= steps for m in switches):
            raise ConfigurationError(
                f"switch_steps must be between 0 and {steps}, the number of steps that the call makes, but got "
                f"{switches!r}."
            )
        if not switches:
            return
        family = family_of(type(self._pipe))
        if not has_null_text:
            self._remarks.append(REMARK_NO_GUIDANCE)
        elif family.only is not None and not family.calls:
            self._remarks.append(REMARK_NO_TEXT.format(pipeline=type(self._pipe).__name__))
        else:
            self._ways = [(way, m) for way in ("F", "L") for m in switches]

    def _draw(self, call: Mapping[str, Any], seed: int, null_text: NullText) -> None:
        """Repeat the generations to get their images."""
        for way, m in [("", 0), *self._ways]:
            with null_text.replacing(self._denoisers, _when(way, m)):
                generator = torch.Generator().manual_seed(seed)
                result = self._pipe(**call, generator=generator, output_type="pil", return_dict=False)[0]
            first: Any = result[0] if isinstance(result, list) and result else None
            if not hasattr(first, "save"):
                self._remarks.append(REMARK_NO_PICTURES)
                return
            self._pictures[f"S^{way}_{m}" if way else "S"] = first

    def _count(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._calls) * (1 + len(self._ways)), what)


def _when(way: str, m: int) -> Callable[[int], bool]:
    """Return a function that returns whether a step runs without text."""
    if way == "F":
        return lambda step: step >= m
    if way == "L":
        return lambda step: step < m
    return lambda step: False


def analyze(
    pipe: AnyPipeline,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int = 25,
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
    kinds: Sequence[Kind] = ("cross", "self"),
    switch_steps: Sequence[int] | None = None,
    converged_within: float = CONVERGED_WITHIN,
    pictures: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Measure the observations that T-GATE is based on, while a plain pipeline runs.

    - How much the outputs of cross- and self-attentions change from step to step.
    - The norms of these outputs for both guidance halves, and the distance between the halves.
    - How the images change without the text from step m on (S^F_m), or with the text only from step m on (S^L_m).
    - The gate that the convergence suggests.

    Source: arXiv 2404.02747 v1, section 4, figures 2 and 3. `docs/evidence/analysis.md` shows the results for the
    embedded pipeline.

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, even after an error.
        prompts: prompts; None if `call` contains prompt embeddings.
        num_inference_steps: as for the pipeline's call.
        seeds: seeds of the noise for each prompt.
        call: further arguments for the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`.
        kinds: kinds of attention to record. The last output of each is kept on the device, so `("cross",)` needs less
            memory.
        switch_steps: values of m for the trajectories, from 0 to the number of steps; each takes two generations. None
            for a few spread over the steps, () for none.
        converged_within: the threshold for convergence, as a fraction of the range from the smallest to the largest
            change of the cross-attentions.
        pictures: also keep the first prompt's images.
        progress: called after each generation with the number of generations done, the total, and a description of
            what was run.

    Raises:
        ConfigurationError: an argument is invalid.
        UnsupportedModelError: the pipeline has no cross-attention that can be recorded.
    """
    if not kinds or "cross" not in kinds or not set(kinds) <= {"cross", "self"}:
        raise ConfigurationError(f'kinds must be "cross", or "cross" and "self", but got {kinds!r}.')
    if isinstance(converged_within, bool) or not isinstance(converged_within, float) or not 0 < converged_within < 1:
        raise ConfigurationError(
            "converged_within must be a number between 0 and 1 (0.1: a tenth of the range), but got "
            f"{converged_within!r}."
        )
    check_pipeline_first("analyze", pipe, prompts)
    check_ordinary(pipe, "analyze()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "analyze")
    names = denoiser_names(pipe, denoiser)
    attach(pipe, dict.fromkeys(names, Schedule(1)), backend="eager")  # report errors before any work is done
    detach(pipe)
    denoisers = {name: getattr(pipe, name) for name in names}
    run = Run(pipe, denoisers, runs, kinds=frozenset(kinds), switch_steps=switch_steps, progress=progress)
    return run.analyze(converged_within=converged_within, pictures=pictures)
