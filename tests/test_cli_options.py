"""The options of all commands: quick help, whole names, and one meaning for each name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tgate_compile._cli.app import COMMANDS, app
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile.methods.method import methods, options_of
from tgate_compile.methods.schedule import IN_SHORT, Schedule

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "matplotlib")

HELP = f"""
import json, sys
from typer.testing import CliRunner
from tgate_compile._cli.app import COMMANDS, app
imported = {{}}
for command in ("", *COMMANDS):
    result = CliRunner().invoke(app, [command, "--help"] if command else ["--help"])
    assert result.exit_code == 0, result.output
    imported[command] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps(imported))
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {command: [] for command in ("", *COMMANDS)}
    assert not done.stderr


def parameters(command: str) -> list[Any]:
    group: Any = typer.main.get_command(app)
    found: list[Any] = group.get_command(None, command).params
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_whole_at_80_columns(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert "…" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    words = result.stdout.replace(",", " ").split()
    for parameter in parameters(command):
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert name in words or parameter.param_type_name == "argument"


#: Options whose help may differ between commands, and their common meaning.
ONE_MEANING = {
    "--out": "where results are written",
    "--plot": "the file of a picture",
    "--model": "the model; `bench` has random ones as well, `compare` takes several",
    "--prompt": "what to show; several times where a command takes several",
    "--count": "how many of the prompts",
    "--gate-step": "the gate step; `auto` where a model is loaded and one schedule is used",
    "--schedule": "a schedule file; several times where schedules are compared",
    "--backend": "the backend; several times in `bench`",
    "--method": "a caching method by its name; `compare` has more than `bench`",
    "--guidance": "the guidance scale; `strip` has no model whose own it would be",
    "--scheduler": "the scheduler; `run` has fewer",
    "--binding-times": "splitting by binding time; `report` counts the parts",
}


def test_an_option_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[str | None]] = defaultdict(set)
    for command in COMMANDS:
        for parameter in parameters(command):
            if parameter.param_type_name == "option":
                meanings[max(parameter.opts, key=len)].add(parameter.help)
    several = {name for name, found in meanings.items() if len(found) > 1}
    assert several <= set(ONE_MEANING), several - set(ONE_MEANING)


def test_a_number_is_a_number_in_every_command() -> None:
    kinds: dict[str, set[bool]] = defaultdict(set)
    for command in COMMANDS:
        for parameter in parameters(command):
            for name in parameter.opts:
                kinds[name].add(bool(getattr(parameter, "is_flag", False)))
    assert [name for name, flags in kinds.items() if len(flags) > 1] == []


def test_every_field_of_a_schedule_is_an_option_of_every_command_that_takes_one() -> None:
    own = {field.name for field in dataclasses.fields(ScheduleOptions)} - {"file"}
    further = {name for kind in methods().values() if kind not in IN_SHORT for name in options_of(kind)}
    assert own == {field.name for field in dataclasses.fields(Schedule)} - {"others"} | further
    for command in ("generate", "export", "describe", "web", "serve", "strip", "report"):
        names = {parameter.name for parameter in parameters(command)}
        assert own <= names, command
