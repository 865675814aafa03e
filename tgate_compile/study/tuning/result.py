"""The result of `tune` and its plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile.methods.method import ESTIMATED
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import save_schedule, schedule_data
from tgate_compile.study.figures import INK, LINE, SOFT, aligned, new_figure, save_figure
from tgate_compile.study.tuning.recorder import Convergence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which is safe for all kinds of colour vision; the markers repeat the information.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_tuning(tuning: Tuning, path: str | Path) -> None:
    """Write the plot of `tuning` to `path`."""
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
    figure.suptitle(_title(tuning), color=INK, fontsize=10, x=0.01, ha="left")
    _draw_convergence(left, tuning)
    _draw_table(right, tuning)
    for axes in (left, right):
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(colors=SOFT, labelsize=8, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(LINE)
    save_figure(figure, path)


def _title(tuning: Tuning) -> str:
    images = max(1, len(tuning.prompts)) * len(tuning.seeds)
    return (
        f"{tuning.setting['pipeline']}, {tuning.num_steps} steps of {tuning.setting['scheduler']}, {images} image"
        f"{'s' if images > 1 else ''}: {tuning.schedule}"
    )


def _draw_convergence(axes: Axes, tuning: Tuning) -> None:
    axes.set_title("Change of the cross-attentions from step to step", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.set_ylabel("relative change since the previous step", color=SOFT, fontsize=9)
    mean, spread = tuning.convergence.mean, tuning.convergence.spread
    steps = list(range(1, len(mean) + 1))
    axes.plot(steps, mean, color=_COLOURS[0], marker="o", markersize=3, linewidth=1.4)
    low = [max(m - s, 0.0) for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.15, linewidth=0)
    axes.set_xlim(0, tuning.num_steps)
    axes.set_ylim(bottom=0)
    strip = tuning.chosen.strip
    end = next((step for step, letter in enumerate(strip) if letter.islower() and letter != ESTIMATED), None)
    if end:
        axes.axvline(end, color=_COLOURS[5], linewidth=1.2, linestyle="--")
        words = "cached" if tuning.schedule.gate_step is not None else "no guidance"
        axes.text(
            end, 0.97, f" {words} from\n step {end} on", color=_COLOURS[5], fontsize=8, va="top",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _draw_table(axes: Axes, tuning: Tuning) -> None:
    axes.set_title("Cost and drift of each schedule", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("operations of the denoiser, plain = 1", color=SOFT, fontsize=9)
    axes.set_ylabel("relative drift of the final latents", color=SOFT, fontsize=9)
    families = list(dict.fromkeys(row.family for row in sorted(tuning.table, key=lambda row: row.schedule is None)))
    for index, family in enumerate(families):
        rows = [row for row in tuning.table if row.family == family and math.isfinite(row.drift)]
        baseline = all(row.schedule is None for row in rows)
        colour = SOFT if baseline else _COLOURS[index % len(_COLOURS)]
        costs, drifts = [row.cost for row in rows], [row.drift for row in rows]
        axes.errorbar(costs, drifts, [row.spread for row in rows], color=colour, linewidth=0, elinewidth=2.0, alpha=0.2)
        axes.plot(
            costs, drifts, label=family, color=colour, marker="x" if baseline else _MARKERS[index % len(_MARKERS)],
            markersize=4.5, linewidth=1.2, linestyle=":" if baseline else "-",
        )  # fmt: skip
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": "--"}
    words: dict[str, Any] = {"color": INK, "fontsize": 8, "va": "bottom"}
    if tuning.budget is not None:
        axes.axvline(tuning.budget, **line)
        axes.text(tuning.budget, 0.0, f" {tuning.limit}", transform=axes.get_xaxis_transform(), **words)
    elif tuning.tolerance is not None:
        axes.axhline(tuning.tolerance, **line)
        axes.text(0.0, tuning.tolerance, f" {tuning.limit}", transform=axes.get_yaxis_transform(), **words)
    chosen = tuning.chosen
    axes.plot(
        chosen.cost, chosen.drift, label=f"chosen: {chosen.label} ({chosen.cost:.2f}, {chosen.drift:.3f})",
        color=_COLOURS[5], marker="o", markersize=13, markerfacecolor="none", linewidth=0,
    )  # fmt: skip
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=8, labelcolor=INK, loc="upper right", frameon=False, ncols=2)


_HEADINGS = ("", "family", "schedule", "strip", "cost", "drift", "spread", "worst", "time")


@dataclass(frozen=True)
class TuningRow:
    """The measurements of one schedule in a `Tuning`.

    Attributes:
        family: group of the schedule in tables and plots: T-GATE, T-GATE v2, guidance drop, the title of another
            method, plan of steps, fewer steps, or given.
        label: description of the schedule.
        schedule: the schedule; None for fewer steps, which is a baseline without a schedule.
        strip: one character per step, as in `docs/reference/schedules.md`.
        cost: multiply-accumulates of an image in the denoiser's linear and convolution layers, relative to the plain
            pipeline.
        drift: ||x - plain x|| / ||plain x|| of the final latents, averaged over all images; infinite if some latents
            are not finite.
        spread: standard deviation of the drift.
        worst: largest drift of an image.
        within: whether `drift` is within the tolerance, or `cost` within the budget if there is one.
        time: time of an image relative to the plain pipeline, measured with the backend of the tuning. For information
            only, since it is noisy. None if it is unreliable, or if there was only one generation, which also had to
            make the graphs.
        unreliable: why `time` is unreliable, if it is.
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
        """Whether the schedule costs less than the plain pipeline."""
        return self.cost < 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with None for numbers that are not finite."""
        data = asdict(self) | {"schedule": self.schedule and schedule_data(self.schedule)}
        return {name: None if value in (math.inf, -math.inf) else value for name, value in data.items()}


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`. Print it for the table, `save` it as a schedule file, or `plot` it.

    Attributes:
        schedule: the cheapest schedule within the tolerance, or the one with the least drift within the budget.
        table: all measured schedules, cheapest first.
        convergence: how much the cross-attentions of the plain pipeline change from step to step.
        tolerance: largest drift allowed; None if there is a budget.
        num_inference_steps: number of steps passed to the pipeline's call.
        num_steps: number of steps that the call makes (fewer for `strength < 1`).
        prompts: the prompts, if given.
        seeds: seeds of the noise for each prompt.
        call: further arguments of the call, as text.
        setting: classes of pipeline, denoiser and scheduler, device, dtype, backend, precision and versions.
        budget: largest cost allowed, if that was given instead of a tolerance.
    """

    schedule: Schedule
    table: tuple[TuningRow, ...]
    convergence: Convergence
    tolerance: float | None
    num_inference_steps: int
    num_steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, str]
    setting: Mapping[str, str]
    budget: float | None = None

    @property
    def limit(self) -> str:
        """The tolerance or the budget, as text."""
        return f"tolerance {self.tolerance:g}" if self.budget is None else f"budget {self.budget:g}"

    @property
    def chosen(self) -> TuningRow:
        """The row of the chosen schedule."""
        return next(row for row in self.table if row.schedule == self.schedule)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {
            "schedule": schedule_data(self.schedule),
            "table": [row.as_dict() for row in self.table],
        }

    def save(self, path: str | Path) -> None:
        """Write the schedule and all measurements to a JSON file for `optimize(pipe, schedule=path)`.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        save_schedule(
            self.schedule, path, {name: value for name, value in self.as_dict().items() if name != "schedule"}
        )

    def plot(self, path: str | Path) -> None:
        """Draw convergence over steps and drift against cost, to a .png, .svg or .pdf file.

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
                f"({self.limit})",
                f"{self.setting['pipeline']}, {self.num_steps} steps of {self.setting['scheduler']}, {images}",
                "",
                *aligned([_HEADINGS, *(self._cells(row) for row in self.table)], texts=4),
                "",
                "cost: multiply-accumulates of the denoiser; drift: relative, of the final latents; time: noisy.",
                f"*: chosen; x: outside the {self.limit.split()[0]}; ?: the machine was too busy to measure the time.",
                *self.remarks,
            ]
        )

    def _cells(self, row: TuningRow) -> tuple[str, ...]:
        mark = "*" if row is self.chosen else "" if row.within else "x"
        numbers = (f"{value:.3f}" for value in (row.cost, row.drift, row.spread, row.worst))
        time = "?" if row.unreliable else "" if row.time is None else f"{row.time:.2f}"
        return (mark, row.family, row.label, row.strip, *numbers, time)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks to print below the table: whether fewer steps would do as well or better."""
        chosen = self.chosen
        if self.budget is not None:
            return self._beside_fewer_steps(self.budget)
        # Compare the numbers as shown; smaller differences do not count.
        cost, drift = round(chosen.cost, 3), round(chosen.drift, 3)
        fewer = [row for row in self.table if row.schedule is None and row.within and round(row.cost, 3) <= cost]
        better = [row for row in fewer if round(row.cost, 3) < cost or round(row.drift, 3) <= drift]
        if not better:
            return ()
        closest = min(better, key=lambda row: (row.drift, row.cost))
        verdict = "do better" if round(closest.drift, 3) <= drift else "do as well"
        return (
            f"Fewer steps would {verdict}: {closest.label} without a schedule cost {closest.cost:.3f}, with drift "
            f"{closest.drift:.3f}.",
        )

    def _beside_fewer_steps(self, budget: float) -> tuple[str, ...]:
        fewer = [row for row in self.table if row.schedule is None and row.cost <= budget]
        if not fewer:
            return ()
        closest = min(fewer, key=lambda row: (row.drift, row.cost))
        better = round(closest.drift, 3) <= round(self.chosen.drift, 3)
        return (
            f"{'Fewer steps would do better' if better else 'With fewer steps, images drift more'}: {closest.label} "
            f"without a schedule cost {closest.cost:.3f}, with drift {closest.drift:.3f}.",
        )


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
