"""`tgate-compile demo`: the embedded model under several schedules, in a table and a picture."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, check_folder, make_progress, print_json, print_note
from tgate_compile._cli.options import EMBEDDED
from tgate_compile._cli.settings import MSG_NEVER_GATED
from tgate_compile._runtimes import automatic_backends
from tgate_compile.methods.schedule import Schedule

if TYPE_CHECKING:
    from rich.progress import Progress

    from tgate_compile._cli.demo_runs import Mode, Results, Row, Task
    from tgate_compile._errors import BackendName


# Two lines each, so that the table fits into 80 columns.
_HEADINGS = (
    "time per\nimage",
    "against\nplain",
    "MACs per\nimage",
    "params\ngated",
    "cache",
    "prompts\nright",
    "PSNR to\nplain",
)


def results_table(results: Results) -> RenderableType:
    """Return the table and the notes that the demo prints."""
    task = results.task
    count = len(task.prompts)
    table = Table(
        title=f"Prompts: {count}, {task.steps} steps, guidance {task.guidance:g}, gate step {task.gate}",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        table.add_row(*_cells(row, count))
    return Group(table, *sentences(results))


def sentences(results: Results) -> list[str]:
    """Return the notes below the table, one line each."""
    lines = [
        "Times: median over the prompts after a warm-up, with the rows interleaved. "
        "MACs: the denoiser's linear and convolution layers. "
        f"Parameters: after the gate; {results.rows[0].parameters / 1e6:.2f} M before it.",
        "Guidance drop: the plain pipeline with guidance only up to the gate, without caches.",
    ]
    first = [f"{row.title} {row.first_call_extra_seconds:.1f} s" for row in results.rows if row.cache_bytes]
    if first:
        lines.append(f"Additional time of the first call, which captures and compiles the graphs: {'; '.join(first)}.")
    lines.append(guidance_sentence(results))
    if any(row.key == "inductor" for row in results.rows):
        lines.append("The compiled row also includes the effect of Inductor itself, positive or negative.")
    return lines


def guidance_sentence(results: Results) -> str:
    """Return a sentence on how much of T-GATE's saving comes from the dropped guidance alone."""
    from tgate_compile._cli.demo_runs import saving_by_guidance

    rows = {row.key: row for row in results.rows}
    plain, dropped, eager = rows["plain"], rows["guidance_dropped"], rows["eager"]
    if not eager.cache_bytes:
        return "Nothing was gated, so nothing is saved."
    work = (plain.macs - dropped.macs) / (plain.macs - eager.macs)
    share = saving_by_guidance(results.rows)
    if share is None:
        return (
            "T-GATE saved no time here: the machine is too busy, or there are too few images. "
            f"Dropping guidance after the gate accounts for {work:.0%} of the MACs that it saves."
        )
    return (
        f"The guidance drop alone accounts for {share:.0%} of the time that T-GATE (eager) saves, and {work:.0%} of "
        "the MACs. The rest comes from the cross-attention and, on a model this small, from less Python overhead."
    )


def _cells(row: Row, count: int) -> tuple[str, ...]:
    psnr = "identical" if row.mean_psnr is None else f"{row.mean_psnr:.1f} dB"
    return (
        row.title,
        f"{row.seconds:.3f} s",
        f"{row.speedup:.2f}x",
        f"{row.macs / 1e9:.2f} G",
        f"{row.parameters_gated / 1e6:.2f} M",
        f"{row.cache_bytes / 1e3:.0f} kB" if row.cache_bytes else "",
        f"{sum(row.right)} of {count}",
        "" if row.key == "plain" else psnr,
    )


def demo(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for demo.png and demo.json.", rich_help_panel=options.OUTPUT),
    ] = Path("tgate-demo"),
    gate_step: options.GateStep = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    count: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of prompts to use.", rich_help_panel=options.IMAGE)
    ] = 8,
    seed: options.Seed = 0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Add a row compiled with Inductor, which takes a minute or two.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Draw images with and without T-GATE on the embedded model, and print a table of the savings."""
    check_folder(out)
    steps = EMBEDDED.steps if steps is None else steps
    gate_step = max(1, round(steps * EMBEDDED.gate_step / EMBEDDED.steps)) if gate_step is None else gate_step
    gate = Schedule(gate_step).gate(steps)
    if gate >= steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=steps).replace(", or --no-tgate", ""))
    fastest = automatic_backends("cpu")[0]
    backends: dict[BackendName, None] = dict.fromkeys(("eager", fastest, *(("inductor",) if compiled else ())))  # type: ignore[arg-type]
    ERR.print(f"[dim]Backends: {', '.join(backends)}. The fastest one installed: {fastest}.[/]")
    with make_progress(shown=True) as progress:
        loading = progress.add_task("Loading the embedded model", total=1)
        # PyTorch and diffusers take seconds.
        from tgate_compile._cli.demo_runs import Task, draw_picture, make_modes, results_of, shown_modes
        from tgate_compile._cli.loading import demo_prompts, quieten_libraries

        quieten_libraries()
        scale = EMBEDDED.guidance if guidance is None else guidance
        task = Task(tuple(demo_prompts(count)), steps, scale, gate, seed)
        modes = make_modes(gate, list(backends))
        progress.advance(loading)
        _run_all(progress, task, modes)
        judging = progress.add_task("Reading the images", total=1)
        results = results_of(modes, task)
        progress.advance(judging)
    data = results.as_dict()
    picture_path, data_path = out / "demo.png", out / "demo.json"
    draw_picture(results, *shown_modes(modes)).save(picture_path)
    data_path.write_text(json_format.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if json:
        print_json(data)
    else:
        OUT.print(results_table(results))
        OUT.print(f"Picture: {picture_path}\nFigures: {data_path}", soft_wrap=True)


def _run_all(progress: Progress, task: Task, modes: Sequence[Mode]) -> None:
    from tgate_compile._cli.demo_runs import measure, warm_up

    preparing = progress.add_task("", total=len(modes))
    for mode in modes:
        what = "Compiling (a minute or two)" if mode.key == "inductor" else "Warming up"
        progress.update(preparing, description=f"{what}: {mode.title}")
        if mode.key != "guidance_dropped":  # it uses the plain pipeline, which is warm by then
            warm_up(mode, task)
        progress.advance(preparing)
    progress.update(preparing, description="Warmed up")
    images = progress.add_task("", total=len(task.prompts) * len(modes))
    for index in range(len(task.prompts)):
        # The rows take turns in a changing order, so that a busy moment does not affect only one of them.
        for turn in range(len(modes)):
            mode = modes[(index + turn) % len(modes)]
            progress.update(images, description=f"Image {index + 1}: {mode.title}")
            measure(mode, task, index)
            progress.advance(images)
    progress.update(images, description="Images made")
