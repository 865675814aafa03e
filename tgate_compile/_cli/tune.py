"""`tgate-compile tune`: measure schedules on a few prompts, and keep the cheapest that is close enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli.console import ERR, OUT, make_progress, print_json
from tgate_compile._cli.loading import embedded_name, load
from tgate_compile._cli.pictures import check_targets, coloured
from tgate_compile.study.figures import check_figure
from tgate_compile.study.tuning.result import Tuning, TuningRow
from tgate_compile.study.tuning.search import DEFAULT_TOLERANCE
from tgate_compile.study.tuning.search import tune as tune_pipeline

_EMBEDDED_PROMPTS = 4


def tune(
    model: options.Model = None,
    model_config: options.ModelConfig = None,
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    tolerance: Annotated[
        float, typer.Option(help="Drift of the final latents that is allowed, as a fraction of their norm.")
    ] = DEFAULT_TOLERANCE,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: prompt_options.Seeds = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the schedule to this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what was measured: .png, .svg or .pdf.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    scheduler: options.Scheduler = None,
    unet: options.Unet = None,
    lora: options.Lora = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: options.Json = False,
) -> None:
    """Find the cheapest schedule whose images stay close to the plain pipeline's, on a few prompts."""
    embedded = None if embedded_name(model) is None else _EMBEDDED_PROMPTS
    texts = prompt_options.chosen_prompts(prompt, prompts, embedded=embedded)
    if plot is not None:
        check_figure(plot)
    check_targets([path for path in (out, plot) if path is not None], force=force)
    with ERR.status("Loading the model"):
        loaded = load(
            model, model_config=model_config, device=device, dtype=dtype, scheduler=scheduler, unet=unet, lora=lora
        )
    call: dict[str, Any] = {
        **loaded.call,
        "guidance_scale": loaded.family.guidance if guidance is None else guidance,
        "height": height,
        "width": width,
    }
    with make_progress(shown=not json) as progress:
        task = progress.add_task("plain", total=None)
        tuning = tune_pipeline(
            loaded.pipe,
            texts,
            tolerance=tolerance,
            num_inference_steps=loaded.family.steps if steps is None else steps,
            seeds=seed or (0,),
            call={name: value for name, value in call.items() if value is not None},
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    if out is not None:
        tuning.save(out)
    if plot is not None:
        tuning.plot(plot)
    written = {name: str(path) for name, path in (("out", out), ("plot", plot)) if path is not None}
    if json:
        print_json({"model": loaded.source} | tuning.as_dict() | {"strip": tuning.chosen.strip, "written": written})
        return
    _print_table(tuning)
    for path in written.values():
        OUT.print(f"written {path}", soft_wrap=True)


def _print_table(tuning: Tuning) -> None:
    table = Table("", "schedule", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("cost", "drift", "worst", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in tuning.table:
        table.add_row(*_cells(row, chosen=row is tuning.chosen))
    OUT.print(table)
    chosen = tuning.chosen
    OUT.print(Text.assemble((str(tuning.schedule), "bold"), "  ", coloured(chosen.strip)), soft_wrap=True)
    OUT.print(
        f"{chosen.cost:.3f} of the plain pipeline's operations, drift {chosen.drift:.3f}, tolerance "
        f"{tuning.tolerance:g}; {tuning.num_steps} steps of {tuning.setting['scheduler']}",
        soft_wrap=True,
    )
    for remark in tuning.remarks:
        OUT.print(remark, soft_wrap=True)


def _cells(row: TuningRow, *, chosen: bool) -> list[Text]:
    style = "bold green" if chosen else "" if row.within else "dim"
    time = "" if row.time is None else f"{row.time:.2f}"
    numbers = [f"{value:.3f}" for value in (row.cost, row.drift, row.worst)]
    return [Text(cell, style) for cell in ("*" if chosen else "", row.label, *numbers, time)]
