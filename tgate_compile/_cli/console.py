"""The console: messages, progress of steps, how much work a step is, and strips."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import GRAPH_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

    from tgate_compile.pipeline.describe import Description

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)

#: Loggers of packages that warn while they are imported.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def print_error(message: str) -> None:
    """Print an error on stderr. Lines are not wrapped, so that paths and options stay whole."""
    ERR.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)


def print_note(message: str) -> None:
    """Print a note on stderr."""
    ERR.print(f"[yellow]Note:[/] {escape(message)}", soft_wrap=True)


def print_json(data: Mapping[str, Any]) -> None:
    """Print JSON on stdout, without colours, line wrapping, NaN or Infinity, even on a terminal."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def show_logs(verbosity: int) -> None:
    """Show the library's log on stderr: warnings at 0, progress at 1, every detail at 2.

    Below 2, other packages' loggers show only errors: users of the command line cannot act on the advice that these
    packages log when they are imported.
    """
    for name in _TALKATIVE:
        # A filter, because PyTorch resets the levels of loggers when it is imported.
        foreign = logging.getLogger(name)
        foreign.removeFilter(_errors_only)
        if verbosity < 2:
            foreign.addFilter(_errors_only)
    logger = logging.getLogger("tgate_compile")
    for handler in [handler for handler in logger.handlers if isinstance(handler, RichHandler)]:
        logger.removeHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
    logger.addHandler(RichHandler(console=ERR, show_path=False, log_time_format="%X"))


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates in linear and convolution layers, over all steps of one image.

    Attributes:
        plain: without a schedule.
        guidance_dropped: guidance stops at the same step, and nothing is cached.
        gated: with the schedule.
    """

    plain: int
    guidance_dropped: int
    gated: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts as plain data."""
        return {f"macs_{name}": value for name, value in asdict(self).items()}


def planned_calls(scheduler: Any, strip: str, num_steps: int) -> str:
    """Return the letter of each denoiser call, given a letter for each step. Sets the scheduler's timesteps."""
    scheduler.set_timesteps(num_steps)
    from tgate_compile.pipeline.progress import StepCounter  # PyTorch takes seconds

    counter = StepCounter.of(scheduler, None)
    return "".join(strip[counter.step(call)] for call in range(len(scheduler.timesteps)))


def work_of(description: Description, calls: str) -> Work:
    """Return the work of a generation with these calls by an optimized pipeline that has captured their graphs.

    A call of the full graph without guidance counts as half a call with guidance, because the batch is half.
    """
    graphs: dict[str, dict[int, int]] = {}
    for variant in description.variants:
        graphs.setdefault(variant.name, {})[variant.batch] = variant.macs
    macs = {letter: _macs(graphs, letter) for letter in set(calls)}
    whole = macs.get("F", macs.get("f", 0))
    is_guided = calls[0].isupper()
    return Work(
        plain=whole * len(calls),
        guidance_dropped=sum(whole // 2 if is_guided and call.islower() else whole for call in calls),
        gated=sum(macs[call] for call in calls),
    )


#: The graphs that serve a step which is decided while it runs, by its letter. Undecided steps may compute everything.
_PARTS = {
    "K": ("head", "finish"),
    "L": ("pruned, head", "pruned, finish"),
    "B": ("head", "tail"),
    "C": ("pruned, head", "pruned, tail"),
}


def _macs(graphs: dict[str, dict[int, int]], letter: str) -> int:
    """Return the multiply-accumulates of a step's graphs; steps with guidance have the larger batch."""
    by_batch = graphs.get(GRAPH_NAMES[letter.upper()])
    if by_batch is None:
        first, second = (graphs[part] for part in _PARTS[letter.upper()])
        by_batch = {batch: macs + second[batch] for batch, macs in first.items()}
    return by_batch[max(by_batch) if letter.isupper() else min(by_batch)]


def make_progress(*, shown: bool = True) -> Progress:
    """Return a progress display on stderr: stage, bar, count, elapsed and remaining time."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=ERR,
        disable=not shown,
    )


class _StepBar:
    """The part of the interface of tqdm that pipelines use."""

    def __init__(self, progress: Progress, description: str, iterable: Iterable[Any] | None, total: int | None) -> None:
        self._progress = progress
        self._iterable = iterable
        self._task = progress.add_task(description, total=total)

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)


@contextmanager
def steps_shown(pipe: Any, progress: Progress, description: str) -> Iterator[None]:
    """Show the steps of `pipe` in `progress`. Costs nothing, unlike a callback, which may change the latents."""

    def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _StepBar:
        return _StepBar(progress, description, iterable, total)

    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        del pipe.progress_bar


MSG_NOT_PNG = "--out {given} is not a .png file: images are written as PNG, which stores their settings. Use {better}."


MSG_EXISTS = "{given} already exists. Give another --out, or --force to overwrite it."


MSG_NOT_WRITABLE = "Cannot write to the folder {given}: {reason}. Give another --out."


_OTHER_FORMATS = {".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"}


def image_paths(out: Path, seeds: Sequence[int]) -> list[Path]:
    """Return a path for each image: `out` if it is a .png for a single image, otherwise names with the seed.

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
    """Create the parent folders of `paths`, and check that every path can be written.

    Raises:
        ConfigurationError: a folder cannot be created or written to, or a file exists and `force` is off.
    """
    for path in paths:
        check_folder(path.parent)
        if path.exists() and not force:
            raise ConfigurationError(MSG_EXISTS.format(given=path))


def check_folder(folder: Path) -> None:
    """Create `folder`, and check that it can be written to.

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


def coloured(letters: str) -> Text:
    """Return a strip for the terminal, coloured by what is reused, and bold where guidance runs."""
    text = Text()
    for letter in letters:
        style = _STYLES.get(letter.upper(), "default")
        text.append(letter, f"bold {style}" if letter.isupper() else style)
    return text
