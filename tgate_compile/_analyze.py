"""`analyze`: how a pipeline's attentions converge over the steps, and what its text does when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from tgate_compile._analysis.gate import CONVERGED_WITHIN
from tgate_compile._analysis.result import Analysis
from tgate_compile._analysis.run import Progress, Run
from tgate_compile._attach import attach, denoiser_names, detach
from tgate_compile._errors import ConfigurationError
from tgate_compile._modular import check_ordinary
from tgate_compile._schedule import Kind, Schedule
from tgate_compile._tuning.request import Runs

MSG_KINDS = 'kinds must be "cross", or "cross" and "self", but got {given!r}.'
MSG_WITHIN = "converged_within must be a number between 0 and 1 (0.1: a tenth of the way up), but got {given!r}."


def analyze(
    pipe: DiffusionPipeline,
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
    """Look at the attentions of a plain pipeline while it runs: the observations that T-GATE rests on.

    - How much the outputs of cross- and self-attentions change from step to step.
    - How large they are for the two guidance halves, and how far these are apart.
    - What becomes of the images if the text is taken away from step m on (S^F_m), or given from step m on (S^L_m).
    - The gate that the convergence suggests.

    Source: arXiv 2404.02747 v1, section 4, figures 2 and 3. `docs/analysis.md` shows it on the embedded pipeline.

    Args:
        pipe: a plain pipeline, not an optimized one. It is plain again afterwards, also after an error.
        prompts: what to show; None if `call` says it.
        num_inference_steps: as for the pipeline's call.
        seeds: the noise for each prompt.
        call: further arguments of the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        denoiser: as for `optimize`.
        kinds: of attention. The last output of each is kept on the device: `("cross",)` needs less memory.
        switch_steps: m of the trajectories, from 0 to the number of steps, two generations each; None for a few over
            the steps, () for none.
        converged_within: what counts as converged, for the gate: the fraction of the way from the smallest change of
            the cross-attentions up to the largest.
        pictures: also keep the first prompt's images.
        progress: called after each generation with their number, how many there will be, and what was run.

    Raises:
        ConfigurationError: an argument is wrong.
        UnsupportedModelError: the pipeline has no cross-attention that could be looked at.
    """
    if not kinds or "cross" not in kinds or not set(kinds) <= {"cross", "self"}:
        raise ConfigurationError(MSG_KINDS.format(given=kinds))
    if isinstance(converged_within, bool) or not isinstance(converged_within, float) or not 0 < converged_within < 1:
        raise ConfigurationError(MSG_WITHIN.format(given=converged_within))
    check_ordinary(pipe, "analyze()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "analyze")
    names = denoiser_names(pipe, denoiser)
    attach(pipe, dict.fromkeys(names, Schedule(1)), backend="eager")  # refuses what can be refused before any work
    detach(pipe)
    denoisers = {name: getattr(pipe, name) for name in names}
    run = Run(pipe, denoisers, runs, kinds=frozenset(kinds), switch_steps=switch_steps, progress=progress)
    return run.analyze(converged_within=converged_within, pictures=pictures)
