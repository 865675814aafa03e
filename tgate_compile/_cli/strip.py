"""`tgate-compile strip`: a schedule, one character a step, with what the characters mean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tgate_compile._cli import options, schedule_options
from tgate_compile._cli.console import OUT, print_json
from tgate_compile._cli.targets import check_targets
from tgate_compile._figures import check_figure
from tgate_compile._strip_picture import strip_picture

_STYLES = {"F": "cyan", "S": "blue", "D": "green", "P": "yellow", "Q": "red", "R": "magenta"}


def strip(
    gate_step: schedule_options.GateStep = None,
    sp_interval: schedule_options.SpInterval = None,
    fi_interval: schedule_options.FiInterval = None,
    warm_up: schedule_options.WarmUp = None,
    deepcache_interval: schedule_options.DeepcacheInterval = None,
    guidance_step: schedule_options.GuidanceStep = None,
    schedule: schedule_options.File = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[bool, typer.Option("--guidance/--no-guidance", help="Whether guidance is on.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw it, as .png, .svg or .pdf. Needs matplotlib.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: options.Json = False,
) -> None:
    """Show a schedule, one character a step. Runs nothing and needs no model."""
    given = schedule_options.given_options(
        gate_step=gate_step,
        sp_interval=sp_interval,
        fi_interval=fi_interval,
        warm_up=warm_up,
        deepcache_interval=deepcache_interval,
        guidance_step=guidance_step,
    )
    chosen = schedule_options.schedule_from(schedule, given)
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
