"""Where output goes: results to stdout, everything else (progress, notes, logs, errors) to stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One error, on stderr. Lines are not wrapped: a path or an option must stay whole."""
    ERR.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)


def print_note(message: str) -> None:
    """Something to know, on stderr."""
    ERR.print(f"[yellow]Note:[/] {escape(message)}", soft_wrap=True)


def print_json(data: Mapping[str, Any]) -> None:
    """Pure JSON on stdout, whatever the terminal: no colours, no wrapping, no NaN or Infinity."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def show_logs(verbosity: int) -> None:
    """Show the library's log on stderr: nothing at 0, what it does at 1, every detail at 2."""
    logger = logging.getLogger("tgate_compile")
    for handler in [handler for handler in logger.handlers if isinstance(handler, RichHandler)]:
        logger.removeHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
    logger.addHandler(RichHandler(console=ERR, show_path=False, log_time_format="%X"))
