"""The options of commands that take a schedule, and the schedule that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tgate_compile._cli.options import GATE_HELP, parse_gate_step
from tgate_compile._errors import ConfigurationError
from tgate_compile._schedule import Schedule
from tgate_compile._schedule_file import load_schedule

MSG_FILE_ALONE = "--schedule says all about the steps. Leave out {given}, or leave out --schedule."

_STEP = "INT|FRACTION"

GateStep = Annotated[
    float | None,
    typer.Option("--gate-step", "-g", parser=parse_gate_step, metavar=_STEP, help=GATE_HELP, show_default="no gate"),
]
SpInterval = Annotated[
    int | None, typer.Option(min=1, help="Self-attention every so many steps before the gate.", show_default="1")
]
FiInterval = Annotated[int | None, typer.Option(min=1, help="The same after the gate.", show_default="1")]
WarmUp = Annotated[int | None, typer.Option(min=0, help="Steps before --sp-interval counts.", show_default="2")]
DeepcacheInterval = Annotated[
    int | None, typer.Option(min=1, help="A UNet's deep part every so many steps.", show_default="1")
]
DeepcacheBranch = Annotated[
    int | None, typer.Option(min=0, help="Skip connection that the shallow part ends at.", show_default="0")
]
GuidanceStep = Annotated[
    float | None, typer.Option(parser=parse_gate_step, metavar=_STEP, help="Steps with guidance.", show_default="all")
]
AnchorWeight = Annotated[
    float | None,
    typer.Option(help="Weight of the prompt's half in what the gate caches.", show_default="0.5, the paper's"),
]
File = Annotated[
    Path | None, typer.Option("--schedule", help="A schedule file, in the place of options.", show_default="none")
]


def given_options(**options: Any) -> dict[str, Any]:
    """Those options of a schedule that were given, by the names of its fields."""
    return {name: value for name, value in options.items() if value is not None}


def schedule_from(file: Path | None, given: Mapping[str, Any]) -> Schedule:
    """The schedule in `file`, or else that of the options.

    Raises:
        ConfigurationError: both are given, or what is given makes no schedule.
    """
    if file is None:
        return Schedule(**{"gate_step": None, **given})
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(MSG_FILE_ALONE.format(given=shown))
    return load_schedule(file)
