"""`tgate-compile report`: what schedules cost on the real models, without their weights."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_note
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import schedule_data
from tgate_compile.study.architectures import ALL_MODELS, MODELS, model_named
from tgate_compile.study.cost import paper_tables, schedule_of

if TYPE_CHECKING:
    from tgate_compile.study.cost import ImageCost

#: Options whose names differ from those of the arguments of `image_cost`.
_OPTIONS = {"guided": "guidance", "batch": "num-images"}

#: The models of `--binding-times`; a distilled model has the parameters of its original.
BINDING_MODELS = {name: real for name, real in ALL_MODELS.items() if not name.startswith("lcm_")}

MSG_NOTHING_ASKED = "Give --paper for the paper's tables, or --model with one of: {known}."
MSG_PAPER_ALONE = "--paper shows the paper's tables unchanged. Leave out {given}, or leave out --paper."
MSG_BINDING_ALONE = "--binding-times splits the graph of one full step. Leave out {given}."
MSG_TWO_MODELS = "--architecture and --model mean the same here. Leave out one of them."
MSG_TWO_SIZES = "--size sets the height and the width. Leave out {given}."
NOTE_DECIDED = (
    "Steps that are decided while they run may skip blocks: from what it costs if all of them do, to what it costs if "
    "none does. How many do depends on the prompt and the threshold."
)
MSG_NEVER_GATED = "Gate step {gate} is at or beyond the last of {steps} steps, so nothing is gated."


def report(
    paper: Annotated[
        bool, typer.Option("--paper", help="Show the paper's tables with our figures beside them.")
    ] = False,
    architecture: Annotated[
        str | None,
        typer.Option("--architecture", "-a", metavar="NAME", help=f"{', '.join(ALL_MODELS)}.", show_default="all"),
    ] = None,
    *,
    binding_times: Annotated[
        bool,
        typer.Option(
            "--binding-times", help="Show how many parameters a step needs, and how many the prompt or a timestep."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The same as --architecture; it also goes with --binding-times."),
    ] = None,
    pixels: Annotated[
        int | None,
        typer.Option(
            "--size", min=8, metavar="PIXELS", help="Height and width of the images.", show_default="the model's"
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt, for models with joint attention.", show_default="the model's"),
    ] = None,
    schedule: ScheduleOptions,
    image: options.Image,
    num_images: options.NumImages = 1,
    json: options.Json = False,
) -> None:
    """Count the cost of a schedule on a model, or of all rows of the paper's tables. Needs no weights, runs nothing."""
    schedule.check_known_in_advance()
    size: dict[str, Any] = {**image.size}
    if pixels is not None:
        if size:
            raise typer.BadParameter(MSG_TWO_SIZES.format(given=", ".join(_option(name) for name in size)))
        size.update(height=pixels, width=pixels)
    if text_tokens is not None:
        size["text_tokens"] = text_tokens
    if image.steps is not None:
        size["steps"] = image.steps
    if image.guidance is not None:
        size["guided"] = image.guidance > 1
    if num_images > 1:
        size["batch"] = num_images
    given = [*schedule.given, *(["schedule"] if schedule.file is not None else []), *size]
    if binding_times:
        others = [*(_option(name) for name in given), *(["--paper"] if paper else [])]
        others += ["--architecture"] if architecture is not None else []
        if others:
            raise typer.BadParameter(MSG_BINDING_ALONE.format(given=", ".join(others)))
        _report_binding_times(model, json=json)
        return
    if architecture is not None and model is not None:
        raise typer.BadParameter(MSG_TWO_MODELS)
    architecture = model if architecture is None else architecture
    if architecture is None and not paper:
        raise typer.BadParameter(MSG_NOTHING_ASKED.format(known=", ".join(ALL_MODELS)))
    if paper and given:
        raise typer.BadParameter(MSG_PAPER_ALONE.format(given=", ".join(_option(name) for name in given)))
    if architecture is not None:
        model_named(architecture, MODELS if paper else ALL_MODELS)
    chosen = schedule.schedule(None) if schedule.given or schedule.file is not None else None
    rows = _paper_rows(architecture) if paper else _asked_rows(str(architecture), chosen, size)
    if json:
        typer.echo(json_format.dumps(rows, indent=2, allow_nan=False))
    else:
        _print_table(rows, paper=paper)


def _option(name: str) -> str:
    return "--" + _OPTIONS.get(name, name.replace("_", "-"))


def _report_binding_times(model: str | None, *, json: bool) -> None:
    """Print the parameters by binding time of `model`, or of all models."""
    chosen = BINDING_MODELS if model is None else {model: model_named(model, BINDING_MODELS)}
    rows = []
    for name, real in chosen.items():
        with ERR.status(f"Capturing {name}"):
            from tgate_compile.study.cost import binding_times  # PyTorch takes seconds

            times = binding_times(real)
        row: dict[str, Any] = {
            "model": name,
            "params_b": times.parameters / 1e9,
            "prompt_b": times.prompt / 1e9,
            "timestep_b": times.timestep / 1e9,
            "step_b": times.step / 1e9,
            "unread_b": times.unread / 1e9,
            "prelude_mb": times.prelude_bytes / 1e6,
            "row_mb": times.row_bytes / 1e6,
        }
        rows.append({**row, "pruned_step_b": times.pruned_step / 1e9})
    if json:
        typer.echo(json_format.dumps(rows, indent=2, allow_nan=False))
        return
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("params\nB", "prompt\nB", "timestep\nB", "step\nB", "pruned\nstep B", "prelude\nMB", "row\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{row[f'{key}_b']:.3f}" for key in ("params", "prompt", "timestep", "step")]
        pruned = f"{row['pruned_step_b']:.3f}"
        table.add_row(row["model"], *counts, pruned, f"{row['prelude_mb']:.1f}", f"{row['row_mb']:.2f}")
    OUT.print(table)


def _paper_rows(model: str | None) -> list[dict[str, Any]]:
    rows = []
    tables = paper_tables()
    for row in tables["rows"]:
        if model not in (None, row["model"]):
            continue
        schedule, notes = schedule_of(row)
        with ERR.status(f"Capturing {row['model']}"):
            from tgate_compile.study.cost import image_cost  # PyTorch takes seconds

            cost = image_cost(model_named(row["model"]), schedule, steps=row.get("steps"))
        ours = _ours(cost, schedule)
        deviation = ours["ours_macs_t"] / row["macs_t"] - 1
        rows.append({**row, **ours, "deviation": deviation, "notes": list(notes)})
    return rows


def _asked_rows(model: str, schedule: Schedule | None, size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the schedule asked for and of its baselines: guidance drop alone, and every step in full."""
    real = model_named(model, ALL_MODELS)
    chosen = {} if schedule is None else {k: v for k, v in schedule_data(schedule).items() if v is not None}
    steps = size.get("steps", real.steps)
    rows: list[tuple[str, Schedule | None]] = [] if schedule is None else [(_method(schedule), schedule)]
    if schedule is not None and schedule.gate_step is not None:
        gate = schedule.gate(steps)
        if gate >= steps:
            print_note(MSG_NEVER_GATED.format(gate=gate, steps=steps))
        elif size.get("guided", real.guided):
            rows.append(("guidance_drop", Schedule(None, guidance_step=gate)))
    rows.append(("none", None))
    described = []
    for method, each in rows:
        with ERR.status(f"Capturing {model}"):
            from tgate_compile.study.cost import image_cost

            cost = image_cost(real, each, **size)
        about = {"model": model, **size, "steps": steps, "method": method}
        described.append({**about, **(chosen if each is schedule else {}), **_ours(cost, each)})
    return described


def _method(schedule: Schedule) -> str:
    parts = ["deepcache"] if schedule.deepcache_interval > 1 else []
    parts += ["tgate"] if schedule.gate_step is not None else []
    parts += ["adaptive_guidance"] if schedule.guidance_step is not None else []
    parts += [method.key for method in schedule.others]
    return "+".join(parts)


def _ours(cost: ImageCost, schedule: Schedule | None) -> dict[str, Any]:
    return {
        "ours_macs_t": cost.macs / 1e12,
        "ours_macs_with_attention_t": cost.macs_with_attention / 1e12,
        **({} if schedule is None or schedule.rule is None else _least(cost)),
        "ours_params_m": cost.parameters / 1e6,
        "ours_params_at_end_m": cost.parameters_at_end / 1e6,
        "ours_schedule": "none" if schedule is None else str(schedule),
        "ours_strip": cost.strip,
    }


def _least(cost: ImageCost) -> dict[str, Any]:
    """Return the cost if the blocks are skipped in all steps that are decided while they run."""
    return {
        "ours_least_macs_t": cost.least_macs / 1e12,
        "ours_least_macs_with_attention_t": cost.least_macs_with_attention / 1e12,
    }


def _cell(row: Mapping[str, Any], key: str) -> str:
    """Return a figure, or a range for a schedule whose steps are decided while they run."""
    least = row.get(f"ours_least_{key}")
    return f"{row[f'ours_{key}']:.3f}" if least is None else f"{least:.3f} to {row[f'ours_{key}']:.3f}"


def _print_table(rows: Sequence[Mapping[str, Any]], *, paper: bool) -> None:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("schedule", min_width=16)
    headings = ["ours\nT MACs", "with\nattention", "params\nM"]
    for heading in ["paper\nT MACs", headings[0], "deviation", *headings[1:]] if paper else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    notes: list[str] = []
    for row in rows:
        notes += [note for note in row.get("notes", ()) if note not in notes]
        marks = "".join(f" [{notes.index(note) + 1}]" for note in row.get("notes", ()))
        name = row["ours_schedule"] if row["method"] != "guidance_drop" else f"{row['ours_schedule']} alone"
        cells = [row["model"], name + marks]
        cells += [f"{row['macs_t']:.3f}"] if paper else []
        cells += [_cell(row, "macs_t")]
        cells += [f"{row['deviation']:+.3%}"] if paper else []
        cells += [_cell(row, key) for key in ("macs_with_attention_t", "params_m")]
        table.add_row(*cells)
    OUT.print(table)
    if any("ours_least_macs_t" in row for row in rows):
        OUT.print(NOTE_DECIDED, soft_wrap=True)
    for number, note in enumerate(notes, start=1):
        OUT.print(f"[{number}] {note}", markup=False)
