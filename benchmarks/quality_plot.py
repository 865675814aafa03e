"""Plot the results of `quality.py`: quality against cost, with a line per method.

python benchmarks/quality_plot.py benchmarks/results/quality_embedded.json --out docs/results/quality_embedded.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # write files without opening a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator


@dataclass(frozen=True)
class Style:
    """The style of a method in the plot.

    Attributes:
        title: title in the legend.
        colour: colour of line and markers.
        marker: matplotlib's marker.
        line: matplotlib's line style; empty for no line.
        labels: offset of the labels from the markers, in points; None for no labels.
    """

    title: str
    colour: str
    marker: str
    line: str = "-"
    labels: tuple[int, int] | None = None


# Based on Okabe and Ito's palette, which is safe for colour blindness; the markers distinguish methods without colour.
STYLES: dict[str, Style] = {
    "fewer steps": Style("fewer steps (steps)", "#555555", "o", "--", (-4, 9)),
    "guidance drop": Style("guidance drop (guided steps)", "#0072B2", "s", labels=(10, 5)),
    "Adaptive Guidance": Style("Adaptive Guidance (similarity)", "#56B4E9", "D", "", (10, -13)),
    "T-GATE": Style("T-GATE v1 (gate)", "#D55E00", "^", labels=(-3, -20)),
    "T-GATE v2": Style("T-GATE v2 (gate, interval)", "#A64D82", "v", "", (6, -33)),
    "T-GATE, cond cached": Style("T-GATE, cond cached (gate)", "#009E73", "*", labels=(0, 11)),
    "fewer steps + T-GATE, cond cached": Style("the same in fewer steps (steps, gate)", "#009E73", "h", ":", (-10, -5)),
    "DeepCache": Style("DeepCache (interval)", "#B88A00", "P", "-.", (9, 5)),
    "DeepCache + T-GATE": Style("DeepCache + T-GATE (interval, gate)", "#6B5000", "X", ":", (10, -12)),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot pair accuracy and Frechet distance to drawn scenes against multiply-accumulates, in two panels."""
    rows = results["rows"]
    settings = results["settings"]
    with plt.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (wrong, distance) = plt.subplots(
            2, 1, figsize=(12, 13), layout="constrained", sharex=True, height_ratios=(3, 2)
        )
        for method, style in STYLES.items():
            points = sorted((row for row in rows.values() if row["method"] == method), key=lambda row: row["macs"])
            if points:
                errors = [100 * point["pair"]["accuracy_minus_plain_se"] for point in points]
                _line(wrong, style, points, [100 - 100 * p["pair"]["accuracy"]["all"] for p in points], errors)
                # No labels, because the points are below those of the other panel.
                _line(distance, replace(style, labels=None), points, [p["frechet_to_drawings"] for p in points])
        plain = rows["plain"]
        for axes, value in (
            (wrong, 100 - 100 * plain["pair"]["accuracy"]["all"]),
            (distance, plain["frechet_to_drawings"]),
        ):
            axes.axhline(value, color="black", linewidth=1.2, zorder=0)
            axes.annotate(
                "plain, 25 steps",
                (1.0, value),
                (0, 5),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=12,
            )
            axes.plot([1.0], [value], marker="o", color="black", markersize=9, clip_on=False)
            axes.grid(alpha=0.3)
        wrong.set_title(
            f"Wrong pairs / %: images of {settings['pairs']} pairs that do not match their captions; standard errors",
            loc="left",
            fontsize=14,
        )
        distance.set_title(
            "Fréchet distance to drawn scenes of the same captions; lower is better", loc="left", fontsize=14
        )
        distance.set_xlabel("multiply-accumulates of an image; the plain pipeline, 25 steps = 1")
        distance.tick_params(labelbottom=True)
        wrong.set_yscale("symlog", linthresh=1)
        distance.set_yscale("log")
        for axes, ticks in (
            (wrong, (0, 0.5, 1, 2, 5, 10, 20, 50, 100)),
            (distance, (5, 7, 10, 12, 15, 20, 30, 50, 100, 200)),
        ):
            axes.yaxis.set_major_locator(FixedLocator(ticks))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        wrong.set_ylim(bottom=-0.4)
        handles, labels = wrong.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _line(
    axes: Axes, style: Style, points: Sequence[dict[str, Any]], values: list[float], errors: list[float] | None = None
) -> None:
    costs = [point["macs"] for point in points]
    size = 14 if style.marker == "*" else 9
    axes.errorbar(
        costs,
        values,
        yerr=errors,
        label=style.title,
        color=style.colour,
        marker=style.marker,
        markersize=size,
        linestyle=style.line or "none",
        linewidth=1.8,
        elinewidth=0.8,
    )
    if style.labels is None:
        return
    for point, cost, value in zip(points, costs, values, strict=True):
        axes.annotate(
            point["label"],
            (cost, value),
            style.labels,
            textcoords="offset points",
            color=style.colour,
            fontsize=12,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            ha="center" if abs(style.labels[0]) < 5 else "left" if style.labels[0] > 0 else "right",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.out)


if __name__ == "__main__":
    main()
