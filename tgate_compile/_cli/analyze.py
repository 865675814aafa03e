"""`tgate-compile analyze`: how a model's attentions converge over the steps, and when the text matters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli.console import OUT, check_targets, make_progress, print_json
from tgate_compile._cli.options import embedded_name
from tgate_compile._cli.settings import print_chosen, settings_for
from tgate_compile.study.analysis import CONVERGED_WITHIN
from tgate_compile.study.figures import check_figure

if TYPE_CHECKING:
    from tgate_compile.study.analysis.result import Analysis

_EMBEDDED_PROMPTS = 4


def analyze(
    model: options.Model = None,
    *,
    loading: options.Loading,
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    count: prompt_options.Count = None,
    seeds: prompt_options.Seeds = None,
    image: options.Image,
    self_attention: Annotated[
        bool, typer.Option("--self/--no-self", help="Also measure self-attentions, which takes more memory.")
    ] = True,
    switch_step: Annotated[
        list[int] | None,
        typer.Option("--switch-step", min=0, help="Remove or add the text at this step; repeatable."),
    ] = None,
    trajectories: Annotated[
        bool,
        typer.Option("--trajectories/--no-trajectories", help="Also generate with the text in only some of the steps."),
    ] = True,
    converged_within: Annotated[
        float, typer.Option(help="Threshold of convergence, as a fraction of the way from floor to peak.")
    ] = CONVERGED_WITHIN,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write everything to this .json file.", rich_help_panel=options.OUTPUT),
    ] = None,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            "--plot",
            help="Draw the curves into this .png, .svg or .pdf file; repeatable. Needs matplotlib.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Draw the first prompt's images with the text in only some of the steps.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show how attentions converge over the steps, and when the text matters, as in the paper's figures 2 and 3."""
    embedded = None if embedded_name(model) is None else _EMBEDDED_PROMPTS
    texts = prompt_options.chosen_prompts(prompt, prompts, count, embedded=embedded)
    figures = [*(plot or ()), *([pictures] if pictures is not None else ())]
    for figure in figures:
        check_figure(figure)
    targets = [*([out] if out is not None else ()), *figures]
    check_targets(targets, force=force)
    loaded = loading.load(model)
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=None, tgate=False)
    print_chosen(loaded, loading, image, settings)
    call: dict[str, Any] = {**loaded.call, **loaded.guided(settings.guidance), **image.size}
    with make_progress(shown=not json) as progress:
        task = progress.add_task("text in all steps", total=None)
        analysis = tgate_compile.analyze(
            loaded.pipe,
            texts,
            num_inference_steps=settings.steps,
            seeds=seeds or (0,),
            call=call,
            kinds=("cross", "self") if self_attention else ("cross",),
            switch_steps=(switch_step or None) if trajectories else (),
            converged_within=converged_within,
            pictures=pictures is not None,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    if out is not None:
        analysis.save(out)
    for figure in plot or ():
        analysis.plot(figure)
    if pictures is not None:
        analysis.plot_pictures(pictures)
    if json:
        print_json({"model": loaded.source} | analysis.as_dict() | {"written": [str(target) for target in targets]})
        return
    _print_analysis(analysis)
    for target in targets:
        OUT.print(f"written {target}", soft_wrap=True)


def _print_analysis(analysis: Analysis) -> None:
    table = Table("step", box=SIMPLE_HEAD, pad_edge=False)
    curves = {f"{kind} change": attentions.relative for kind, attentions in analysis.kinds.items()}
    curves |= {f"{kind} halves apart": attentions.apart for kind, attentions in analysis.kinds.items()}
    if analysis.trajectories is not None:
        curves["drift, text before it"] = analysis.trajectories.text_first
        curves["drift, text from it on"] = analysis.trajectories.text_last
    curves = {heading: curve for heading, curve in curves.items() if curve.steps}
    for heading in curves:
        table.add_column(heading, justify="right")
    means = [dict(zip(curve.steps, curve.mean, strict=True)) for curve in curves.values()]
    for step in sorted(set().union(*means)):
        table.add_row(str(step), *(f"{of_step[step]:.3f}" if step in of_step else "" for of_step in means))
    OUT.print(table)
    for line in (analysis.gist, *analysis.remarks):
        OUT.print(line, soft_wrap=True)
