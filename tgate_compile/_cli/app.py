"""The typer app: its commands, and errors without tracebacks."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from tgate_compile import __version__
from tgate_compile._cli.console import OUT, print_error, show_logs
from tgate_compile._errors import TGateError

# Recent versions of typer bring their own copy of click, so click's base class is found through typer's.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


#: In the order of `--help`. Each is a function in the module of its name, or in that of `_MODULES`. The modules import
#: PyTorch and other large packages only inside the functions, so that `--help` is quick and `run` needs no PyTorch.
COMMANDS = (
    "demo",
    "generate",
    "run",
    "describe",
    "export",
    "inspect",
    "web",
    "serve",
    "report",
    "strip",
    "tune",
    "analyze",
    "compare",
    "bench",
    "evaluate",
    "cache",
)


_MODULES = {"inspect": "describe", "strip": "describe", "cache": "describe"}

_TYPES = {"int": "N", "int range": "N", "float": "X", "float range": "X", "str": "TEXT", "path": "PATH"}
_TYPE = re.compile(f"<({'|'.join(_TYPES)})>")


class _Command(TyperCommand):
    """A command whose `--help` has sections and does not truncate the names of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                section = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                names, text = record
                sections.setdefault(section, []).append((_TYPE.sub(lambda found: _TYPES[found[1]], names), text))
        # The command's own options, which have no section, come first; --help is the last of them.
        for name in sorted(sections, key=lambda name: name not in ("Arguments", "Options")):
            with formatter.section(name):
                formatter.write_dl(sections[name])


class _Commands(TyperGroup):
    """A group that prints errors in one or two lines on stderr and exits with 1; with `--debug` it raises them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with the first sentence of its help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(self.get_command(ctx, name).help)) for name in COMMANDS])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        function = getattr(importlib.import_module(f"tgate_compile._cli.{_MODULES.get(cmd_name, cmd_name)}"), cmd_name)
        alone.command(cmd_name, cls=_Command)(with_groups(function))
        return typer.main.get_command(alone)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError, _USAGE_ERROR):
            raise  # typer handles them
        except TGateError as error:
            if ctx.params["debug"]:
                raise
            print_error(str(error))
        except Exception as error:
            if ctx.params["debug"]:
                raise
            print_error(
                f"{_in_short(error)}\nThis error is unexpected; tgate-compile --debug ... shows where it was raised."
            )
        raise typer.Exit(1)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` for typer: an argument that is annotated with a dataclass becomes an option for each field."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(parameter.annotation, type)
        groups[parameter.name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in dataclasses.fields(parameter.annotation)
        ]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".") + "."


def _in_short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        OUT.print(f"tgate-compile {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log progress to stderr; -vv logs details.")
    ] = 0,
) -> None:
    """Text-to-image diffusion with T-GATE: cross-attention and guidance only for the steps that need them."""
    show_logs(verbose)
