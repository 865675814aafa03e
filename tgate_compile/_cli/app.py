"""The typer app: its commands, and errors without tracebacks."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tgate_compile import __version__
from tgate_compile._cli.console import OUT, print_error, show_logs
from tgate_compile._errors import TGateError

# Recent versions of typer bring their own copy of click, so click's base class is found through typer's.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


#: In the order of `--help`. Each is a function of that name in a module of that name, imported when it is asked for:
#: so `run` does without torch.
COMMANDS = (
    "demo",
    "generate",
    "run",
    "describe",
    "export",
    "inspect",
    "web",
    "report",
    "strip",
    "tune",
    "analyze",
    "compare",
    "bench",
    "evaluate",
)


class _Commands(TyperGroup):
    """Errors in one or two lines on stderr and exit code 1; with `--debug` they pass, traceback and all."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(getattr(importlib.import_module(f"tgate_compile._cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(alone)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError, _USAGE_ERROR):
            raise  # typer's own business
        except TGateError as error:
            if ctx.params["debug"]:
                raise
            print_error(str(error))
        except Exception as error:
            if ctx.params["debug"]:
                raise
            print_error(
                f"{_in_short(error)}\nThis was not foreseen; tgate-compile --debug ... shows where it happened."
            )
        raise typer.Exit(1)


def _in_short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"tgate-compile {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log what is done to stderr; -vv in detail.")
    ] = 0,
) -> None:
    """Text-to-image diffusion with T-GATE: cross-attention and guidance only for the steps that need them."""
    show_logs(verbose)
