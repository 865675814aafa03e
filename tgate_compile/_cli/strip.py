"""`tgate-compile strip`: a schedule, one character a step, with what the characters mean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tgate_compile._cli import options
from tgate_compile._cli.console import OUT, print_json
from tgate_compile._cli.targets import check_targets
from tgate_compile._errors import ConfigurationError
from tgate_compile._figures import check_figure
from tgate_compile._schedule import Schedule
from tgate_compile._schedule_file import load_schedule
from tgate_compile._strip_picture import strip_picture

MSG_FILE_ALONE = "--schedule says all about the steps. Leave out {given}, or leave out --schedule."

_STYLES = {"F": "cyan", "S": "blue", "D": "green", "P": "yellow", "Q": "red", "R": "magenta"}
_STEP = "INT|FRACTION"


def strip(
    gate_step: Annotated[
        float | None,
        typer.Option(
            "--gate-step",
            "-g",
            parser=options.parse_gate_step,
            metavar=_STEP,
            help=options.GATE_HELP,
            show_default="no gate",
        ),
    ] = None,
    sp_interval: Annotated[
        int | None, typer.Option(min=1, help="Self-attention every so many steps before the gate.", show_default="1")
    ] = None,
    fi_interval: Annotated[int | None, typer.Option(min=1, help="The same after the gate.", show_default="1")] = None,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="Steps before --sp-interval counts.", show_default="2")
    ] = None,
    deepcache_interval: Annotated[
        int | None, typer.Option(min=1, help="A UNet's deep part every so many steps.", show_default="1")
    ] = None,
    guidance_step: Annotated[
        float | None,
        typer.Option(parser=options.parse_gate_step, metavar=_STEP, help="Steps with guidance.", show_default="all"),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="A schedule file, instead of the options above.", show_default="none")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[bool, typer.Option("--guidance/--no-guidance", help="Whether guidance is on.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw it, as .png, .svg or .pdf. Needs matplotlib.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: options.Json = False,
) -> None:
    """Show a schedule, one character a step. Runs nothing and needs no model."""
    given: dict[str, Any] = {
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
        "deepcache_interval": deepcache_interval,
        "guidance_step": guidance_step,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen = _chosen(gate_step, given, schedule)
    if out is not None:
        check_figure(out)
        check_targets([out], force=force)
    plan = chosen.plan(steps, guided=guidance)
    letters = "".join(phase.character for phase in plan)
    if out is not None:
        strip_picture({str(chosen): letters}, out)
    if json:
        picture = None if out is None else str(out)
        print_json({"schedule": str(chosen), "steps": steps, "strip": letters, "picture": picture})
        return
    OUT.print(f"{chosen}, {steps} steps{'' if guidance else ' without guidance'}", soft_wrap=True)
    OUT.print(coloured(letters), soft_wrap=True)
    meanings = {phase.character: phase for phase in plan}
    for letter, count in Counter(letters).items():
        words = f"{meanings[letter].name}, {'guided' if letter.isupper() else 'no guidance: half the batch'}"
        OUT.print(Text.assemble("  ", coloured(letter), f"  {count:3} x {words}"), soft_wrap=True)
    if out is not None:
        OUT.print(f"written {out}", soft_wrap=True)


def coloured(letters: str) -> Text:
    """A strip for the terminal: a colour for what is reused, bold where guidance runs."""
    text = Text()
    for letter in letters:
        style = _STYLES.get(letter.upper(), "default")
        text.append(letter, f"bold {style}" if letter.isupper() else style)
    return text


def _chosen(gate_step: float | None, given: dict[str, Any], file: Path | None) -> Schedule:
    if file is None:
        return Schedule(gate_step, **given)
    named = [*(["gate_step"] if gate_step is not None else []), *given]
    if named:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in named)
        raise ConfigurationError(MSG_FILE_ALONE.format(given=shown))
    return load_schedule(file)
