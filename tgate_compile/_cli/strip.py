"""`tgate-compile strip`: draw a schedule, one character or cell per step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tgate_compile._cli import options
from tgate_compile._cli.console import OUT, check_targets, print_json
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile.study.figures import check_figure, strip_picture

_STYLES = {"F": "cyan", "S": "blue", "D": "green", "P": "yellow", "Q": "red", "R": "magenta"}


def strip(
    *,
    schedule: ScheduleOptions,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.", rich_help_panel=options.IMAGE)] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Guidance scale; up to 1 means no guidance.",
            show_default="with guidance",
            rich_help_panel=options.IMAGE,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the strip into this .png, .svg or .pdf file. Needs matplotlib.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show a schedule, one character per step. Runs nothing and needs no model."""
    schedule.check_known_in_advance()
    chosen = schedule.schedule(None)
    guided = guidance is None or guidance > 1
    if plot is not None:
        check_figure(plot)
        check_targets([plot], force=force)
    plan = chosen.plan(steps, guided=guided)
    letters = "".join(phase.character for phase in plan)
    if plot is not None:
        strip_picture({str(chosen): letters}, plot)
    if json:
        picture = None if plot is None else str(plot)
        print_json({"schedule": str(chosen), "steps": steps, "strip": letters, "picture": picture})
        return
    OUT.print(f"{chosen}, {steps} steps{'' if guided else ' without guidance'}", soft_wrap=True)
    OUT.print(coloured(letters), soft_wrap=True)
    meanings = {phase.character: phase for phase in plan}
    for letter, count in Counter(letters).items():
        words = f"{meanings[letter].name}, {'guided' if letter.isupper() else 'no guidance: half the batch'}"
        OUT.print(Text.assemble("  ", coloured(letter), f"  {count:3} x {words}"), soft_wrap=True)
    if plot is not None:
        OUT.print(f"written {plot}", soft_wrap=True)


def coloured(letters: str) -> Text:
    """Return a strip for the terminal, coloured by what is reused, and bold where guidance runs."""
    text = Text()
    for letter in letters:
        style = _STYLES.get(letter.upper(), "default")
        text.append(letter, f"bold {style}" if letter.isupper() else style)
    return text
