"""`tgate-compile demo`: the embedded pipeline with T-GATE and without, measured side by side."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from tgate_compile._cli import options
from tgate_compile._cli.console import OUT, print_json, print_note
from tgate_compile._cli.demo_modes import Mode, Task, make_modes, measure, warm_up
from tgate_compile._cli.demo_picture import draw_picture, shown_modes
from tgate_compile._cli.demo_prompts import demo_prompts
from tgate_compile._cli.demo_results import results_of
from tgate_compile._cli.demo_table import results_table
from tgate_compile._cli.loading import quieten_libraries
from tgate_compile._cli.settings import MSG_NEVER_GATED
from tgate_compile._cli.step_progress import make_progress
from tgate_compile._cli.targets import check_folder
from tgate_compile._schedule import Schedule


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and demo.json.")] = Path("tgate-demo"),
    gate_step: Annotated[
        float,
        typer.Option(
            "--gate-step", "-g", parser=options.parse_gate_step, metavar="INT|FRACTION", help=options.GATE_HELP
        ),
    ] = 10,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = 5.0,
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="How many prompts.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image; the next one's is one more.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also compile with Inductor, which takes a minute or two.")
    ] = True,
    json: options.Json = False,
) -> None:
    """Prompts become images with T-GATE and without, on the embedded model: a picture, and a table of what it saves."""
    check_folder(out)
    gate = Schedule(gate_step).gate(steps)
    if gate >= steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=steps).replace(", or --no-tgate", ""))
    task = Task(tuple(demo_prompts(prompts)), steps, guidance, gate, seed)
    quieten_libraries()
    with make_progress(shown=True) as progress:
        modes = _run_all(progress, task, compiled=compiled)
    results = results_of(modes, task)
    data = results.as_dict()
    picture_path, data_path = out / "demo.png", out / "demo.json"
    draw_picture(results, *shown_modes(modes)).save(picture_path)
    data_path.write_text(json_format.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if json:
        print_json(data)
    else:
        OUT.print(results_table(results))
        OUT.print(f"Picture: {picture_path}\nFigures: {data_path}", soft_wrap=True)


def _run_all(progress: Progress, task: Task, *, compiled: bool) -> Sequence[Mode]:
    loading = progress.add_task("Loading the embedded model", total=1)
    modes = make_modes(task.gate, compiled=compiled)
    progress.advance(loading)
    preparing = progress.add_task("", total=len(modes))
    for mode in modes:
        what = "Compiling (a minute or two)" if mode.key == "inductor" else "Warming up"
        progress.update(preparing, description=f"{what}: {mode.title}")
        warm_up(mode, task)
        progress.advance(preparing)
    progress.update(preparing, description="Warmed up")
    images = progress.add_task("", total=len(task.prompts) * len(modes))
    for index in range(len(task.prompts)):
        # The rows take turns, and in another order each time, so that a busy moment hits none of them alone.
        for turn in range(len(modes)):
            mode = modes[(index + turn) % len(modes)]
            progress.update(images, description=f"Image {index + 1}: {mode.title}")
            measure(mode, task, index)
            progress.advance(images)
    progress.update(images, description="Images made")
    return modes
