"""A pipeline's own progress bar, shown by rich."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tgate_compile._cli.console import ERR


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
