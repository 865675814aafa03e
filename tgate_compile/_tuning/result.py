"""What tuning has found: the schedule, and the table that justifies it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgate_compile._schedule import Schedule
from tgate_compile._schedule_file import save_schedule
from tgate_compile._tuning.convergence import Convergence
from tgate_compile._tuning.plot import draw_tuning

_HEADINGS = ("", "family", "schedule", "strip", "cost", "drift", "spread", "worst", "time")


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        family: what it is compared with: T-GATE, T-GATE v2, guidance drop, fewer steps, or given.
        label: the schedule in words.
        schedule: None for fewer steps, which is a baseline and no schedule.
        strip: one character a step, as in `docs/schedules.md`.
        cost: multiply-accumulates of an image in the denoiser's linear and convolution layers; the plain pipeline is 1.
        drift: ||x - plain x|| / ||plain x|| of the final latents, the mean of all images; infinite if some of them are
            not finite.
        spread: its standard deviation.
        worst: the largest one.
        within: whether the drift is within the tolerance.
        time: of an image; the plain pipeline is 1. Information only, noisy, and with the backend of the tuning.
            None if there was one generation only, which also has to make the graphs, or if it is unreliable.
        unreliable: why the time cannot be told, where the machine was too busy.
    """

    family: str
    label: str
    schedule: Schedule | None
    strip: str
    cost: float
    drift: float
    spread: float
    worst: float
    within: bool
    time: float | None
    unreliable: str | None = None

    @property
    def saves(self) -> bool:
        """Whether it costs less than the plain pipeline."""
        return self.cost < 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: what is not finite is None."""
        return {name: None if value in (math.inf, -math.inf) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Tuning:
    """What `tune` returns; printing it gives the table, `save` a schedule file, `plot` a picture.

    Attributes:
        schedule: the cheapest one within the tolerance.
        table: everything that was measured, the cheapest first.
        convergence: how much the cross-attentions change from step to step, in the plain pipeline.
        tolerance: the drift allowed.
        num_inference_steps: as passed to the pipeline's call.
        num_steps: how many the call really makes (fewer for `strength < 1`).
        prompts: as given, if they were.
        seeds: the noise of each prompt.
        call: further arguments of the call, described.
        setting: the classes of pipeline, denoiser and scheduler, device, dtype, backend, versions.
    """

    schedule: Schedule
    table: tuple[Row, ...]
    convergence: Convergence
    tolerance: float
    num_inference_steps: int
    num_steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, str]
    setting: Mapping[str, str]

    @property
    def chosen(self) -> Row:
        """The schedule's row."""
        return next(row for row in self.table if row.schedule == self.schedule)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self) | {"table": [row.as_dict() for row in self.table]}

    def save(self, path: str | Path) -> None:
        """Write the schedule, with all that is known of it, to a JSON file for `optimize(pipe, schedule=path)`.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        save_schedule(
            self.schedule, path, {name: value for name, value in self.as_dict().items() if name != "schedule"}
        )

    def plot(self, path: str | Path) -> None:
        """Draw the convergence over the steps, and drift against cost, to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: matplotlib is not installed (`pip install 'tgate_compile[plots]'`), or the file cannot
                be written.
        """
        draw_tuning(self, path)

    def __str__(self) -> str:
        chosen = self.chosen
        images = f"{len(self.prompts) or 1} prompt{'s' if len(self.prompts) > 1 else ''}, seeds {_listed(self.seeds)}"
        return "\n".join(
            [
                f"{self.schedule}: {chosen.cost:.3f} of the plain pipeline's operations, drift {chosen.drift:.3f} "
                f"(tolerance {self.tolerance:g})",
                f"{self.setting['pipeline']}, {self.num_steps} steps of {self.setting['scheduler']}, {images}",
                "",
                *_aligned([_HEADINGS, *(self._cells(row) for row in self.table)]),
                "",
                "cost: multiply-accumulates of the denoiser; drift: of the final latents, relative; time: noisy.",
                "*: chosen; x: not within the tolerance; ?: the machine was too busy to tell.",
                *self.remarks,
            ]
        )

    def _cells(self, row: Row) -> tuple[str, ...]:
        mark = "*" if row is self.chosen else "" if row.within else "x"
        numbers = (f"{value:.3f}" for value in (row.cost, row.drift, row.spread, row.worst))
        time = "?" if row.unreliable else "" if row.time is None else f"{row.time:.2f}"
        return (mark, row.family, row.label, row.strip, *numbers, time)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What else should be known: that fewer steps would do better."""
        chosen = self.chosen
        # The numbers as they are shown: a difference behind these is none.
        cost, drift = round(chosen.cost, 3), round(chosen.drift, 3)
        fewer = [row for row in self.table if row.schedule is None and row.within and round(row.cost, 3) <= cost]
        better = [row for row in fewer if round(row.cost, 3) < cost or round(row.drift, 3) <= drift]
        if not better:
            return ()
        closest = min(better, key=lambda row: (row.drift, row.cost))
        as_well = "do better" if round(closest.drift, 3) <= drift else "do as well"
        return (
            f"Fewer steps would {as_well}: {closest.label} without a schedule cost {closest.cost:.3f}, with drift "
            f"{closest.drift:.3f}.",
        )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        texts = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    return lines


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
