"""The console: messages, progress of steps, and how much work a step is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

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

from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.describe import Description
from tgate_compile.pipeline.progress import StepCounter

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


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates in linear and convolution layers, over all steps of one image.

    Attributes:
        plain: without T-GATE.
        guidance_dropped: as many guided steps, then steps without guidance, and nothing cached.
        gated: with T-GATE.
    """

    plain: int
    guidance_dropped: int
    gated: int

    def as_dict(self) -> dict[str, int]:
        """Plain data; the names say what is counted."""
        return {f"macs_{name}": value for name, value in asdict(self).items()}


def planned_calls(scheduler: Any, schedule: Schedule, num_steps: int) -> str:
    """One character per denoiser call of a generation, `F` full or `p` pruned. Sets the scheduler's timesteps."""
    scheduler.set_timesteps(num_steps)
    counter = StepCounter.of(scheduler, None)
    steps = [counter.step(call) for call in range(len(scheduler.timesteps))]
    return "".join("p" if step >= schedule.gate(counter.num_steps) else "F" for step in steps)


def work_of(description: Description, calls: str) -> Work:
    """The work of a generation with these calls, for an optimized pipeline that has run both graphs.

    A call of the full graph without guidance is the same work at the batch of the pruned graph.
    """
    by_name = {variant.name: variant for variant in description.variants}
    full = by_name["full"]
    pruned = by_name.get("pruned", full)
    calls_full, calls_pruned = calls.count("F"), calls.count("p")
    return Work(
        plain=full.macs * len(calls),
        guidance_dropped=full.macs * calls_full + full.macs * pruned.batch // full.batch * calls_pruned,
        gated=full.macs * calls_full + pruned.macs * calls_pruned,
    )


def make_progress(*, shown: bool = True) -> Progress:
    """A progress display on stderr: stage, bar, count, time so far, time to go."""
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
    """What pipelines use of tqdm."""

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
    """Inside, `pipe` shows its steps in `progress`. Costs nothing, unlike a callback, which may change the latents."""

    def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _StepBar:
        return _StepBar(progress, description, iterable, total)

    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        del pipe.progress_bar
