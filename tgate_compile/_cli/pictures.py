"""The files that commands write, and the strip of a schedule as a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo
from rich.text import Text

from tgate_compile._cli import options
from tgate_compile._cli import options as schedule_options
from tgate_compile._cli.console import OUT, print_json
from tgate_compile._errors import ConfigurationError
from tgate_compile.study.figures import check_figure, strip_picture

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
    info = PngInfo()
    for key, value in texts.items():
        if value is not None:
            info.add_itxt(key, str(value))
    image.save(path, pnginfo=info)


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
