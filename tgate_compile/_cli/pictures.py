"""The files that commands write, and the strip of a schedule as a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tgate_compile._cli import options
from tgate_compile._cli.console import OUT, print_json
from tgate_compile._cli.options import ScheduleOptions
from tgate_compile._errors import ConfigurationError
from tgate_compile.study.figures import check_figure, strip_picture

if TYPE_CHECKING:
    from PIL.Image import Image

MSG_NOT_PNG = "--out {given} is no .png file: images are written as PNG, which keeps the settings. Use {better}."
MSG_EXISTS = "{given} exists already. Give another --out, or --force to overwrite it."
MSG_NOT_WRITABLE = "Cannot write to the folder {given}: {reason}. Give another --out."

_OTHER_FORMATS = {".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"}


def image_paths(out: Path, seeds: Sequence[int]) -> list[Path]:
    """One path per image: `out` itself for one image and a .png, else names that tell the seed.

    Raises:
        ConfigurationError: `out` is a file of another format.
    """
    suffix = out.suffix.lower()
    if suffix in _OTHER_FORMATS and not out.is_dir():
        raise ConfigurationError(MSG_NOT_PNG.format(given=out, better=out.with_suffix(".png")))
    if suffix != ".png" or out.is_dir():
        return [out / f"seed-{seed}.png" for seed in seeds]
    if len(seeds) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-seed-{seed}.png") for seed in seeds]


def check_targets(paths: Sequence[Path], *, force: bool) -> None:
    """Make the folders, and see that every path can be written.

    Raises:
        ConfigurationError: a folder cannot be made or written to, or a file exists and `force` is off.
    """
    for path in paths:
        check_folder(path.parent)
        if path.exists() and not force:
            raise ConfigurationError(MSG_EXISTS.format(given=path))


def check_folder(folder: Path) -> None:
    """Make `folder`, and see that it can be written to.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(MSG_NOT_WRITABLE.format(given=folder, reason=error.strerror)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(MSG_NOT_WRITABLE.format(given=folder, reason="no permission"))


def save_png(image: Image, path: Path, texts: Mapping[str, object]) -> None:
    """Write `image` with `texts` as text chunks, which image viewers show and PIL reads as `image.text`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        if value is not None:
            info.add_itxt(key, str(value))
    image.save(path, pnginfo=info)


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
        typer.Option(help="Draw it: .png, .svg or .pdf. Needs matplotlib.", rich_help_panel=options.OUTPUT),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show a schedule, one character a step. Runs nothing and needs no model."""
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
    """A strip for the terminal: a colour for what is reused, bold where guidance runs."""
    text = Text()
    for letter in letters:
        style = _STYLES.get(letter.upper(), "default")
        text.append(letter, f"bold {style}" if letter.isupper() else style)
    return text
