"""A tuning as a picture: why the cross-attentions can be cached, and what each schedule costs and does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tgate_compile._figures import INK, LINE, SOFT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tgate_compile._tuning.result import Tuning

# Okabe and Ito's colours, for any colour vision; the markers say it once more.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_tuning(tuning: Tuning, path: str | Path) -> None:
    """Write the picture of `tuning` to `path`."""
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
    axes.set_title("How much the cross-attentions still change", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.set_ylabel("change since the step before, relative", color=SOFT, fontsize=9)
    mean, spread = tuning.convergence.mean, tuning.convergence.spread
    steps = list(range(1, len(mean) + 1))
    axes.plot(steps, mean, color=_COLOURS[0], marker="o", markersize=3, linewidth=1.4)
    low = [max(m - s, 0.0) for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.15, linewidth=0)
    axes.set_xlim(0, tuning.num_steps)
    axes.set_ylim(bottom=0)
    end = next((step for step, letter in enumerate(tuning.chosen.strip) if letter.islower()), None)
    if end:
        axes.axvline(end, color=_COLOURS[5], linewidth=1.2, linestyle="--")
        words = "cached" if tuning.schedule.gate_step is not None else "no guidance"
        axes.text(
            end, 0.97, f" {words} from\n step {end} on", color=_COLOURS[5], fontsize=8, va="top",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _draw_table(axes: Axes, tuning: Tuning) -> None:
    axes.set_title("What each schedule costs, and how far it drifts", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("operations of the denoiser, plain = 1", color=SOFT, fontsize=9)
    axes.set_ylabel("drift of the final latents, relative", color=SOFT, fontsize=9)
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
    axes.axhline(tuning.tolerance, color=INK, linewidth=1.0, linestyle="--")
    axes.text(
        0.0, tuning.tolerance, f" tolerance {tuning.tolerance:g}", color=INK, fontsize=8, va="bottom",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    chosen = tuning.chosen
    axes.plot(
        chosen.cost, chosen.drift, label=f"chosen: {chosen.label} ({chosen.cost:.2f}, {chosen.drift:.3f})",
        color=_COLOURS[5], marker="o", markersize=13, markerfacecolor="none", linewidth=0,
    )  # fmt: skip
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=8, labelcolor=INK, loc="upper right", frameon=False, ncols=2)
