"""The options of commands that take several prompts, and the prompts that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgate_compile._cli.demo_prompts import demo_prompts
from tgate_compile._errors import ConfigurationError

MSG_NO_PROMPTS = (
    "Give a few prompts like those that the model will get: --prompt (several times), or --prompts FILE, one a line."
)
MSG_BOTH = "Give --prompt or --prompts, not both."
MSG_NOT_READ = "The prompts cannot be read from {given}: {reason}."
MSG_EMPTY = "{given} has no prompts: expected one a line."

Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="What to show; several times.", show_default="a few")
]
Prompts = Annotated[Path | None, typer.Option(help="A text file with a prompt in each line.", show_default="none")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", min=0, help="Noise for each prompt; several times.", show_default="0")
]


def chosen_prompts(given: list[str] | None, file: Path | None, *, embedded: int | None) -> list[str]:
    """The prompts given, or those in `file`; else so many of the demo's, or (None) an error.

    Raises:
        ConfigurationError: there are none, or two lists of them, or the file cannot be read.
    """
    if given and file is not None:
        raise ConfigurationError(MSG_BOTH)
    if given:
        return given
    if file is None:
        if embedded is None:
            raise ConfigurationError(MSG_NO_PROMPTS)
        return demo_prompts(embedded)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigurationError(MSG_NOT_READ.format(given=file, reason=reason)) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigurationError(MSG_EMPTY.format(given=file))
    return texts
