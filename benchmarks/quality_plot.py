"""Draws what `quality.py` measured: quality against cost, a line per method.

python benchmarks/quality_plot.py benchmarks/results/quality_embedded.json --out docs/results/quality_embedded.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

# Colours by Okabe and Ito, told apart by the colour-blind; markers tell the methods apart without any colour.
STYLES: dict[str, dict[str, Any]] = {
    "fewer steps": {"color": "#555555", "marker": "o", "linestyle": "--"},
    "guidance drop": {"color": "#0072B2", "marker": "s"},
    "Adaptive Guidance": {"color": "#56B4E9", "marker": "D"},
    "T-GATE": {"color": "#D55E00", "marker": "^"},
    "T-GATE, cond cached": {"color": "#009E73", "marker": "*", "markersize": 13},
    "T-GATE v2": {"color": "#CC79A7", "marker": "v"},
    "DeepCache": {"color": "#E69F00", "marker": "P"},
    "DeepCache + T-GATE": {"color": "#8C6D00", "marker": "X"},
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Two panels, pair accuracy and Frechet distance to drawn scenes, over multiply-accumulates."""
    with plt.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (accuracy, distance) = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained")
        rows = results["rows"]
        for method, style in STYLES.items():
            names = sorted((n for n in rows if rows[n]["method"] == method), key=lambda n: float(rows[n]["macs"]))
            if not names:
                continue
            points = [rows[name] for name in names]
            _line(accuracy, method, style, points, [100 * point["pair"]["accuracy"]["all"] for point in points])
            _line(distance, method, style, points, [point["frechet_to_drawings"] for point in points])
        plain = rows["plain"]
        accuracy.axhline(100 * plain["pair"]["accuracy"]["all"], color="black", linewidth=1, zorder=0)
        distance.axhline(plain["frechet_to_drawings"], color="black", linewidth=1, zorder=0)
        accuracy.set_title("Pairs drawn as the caption says / %  (higher is better)", loc="left", fontsize=13)
        distance.set_title("Fréchet distance to drawn scenes  (lower is better)", loc="left", fontsize=13)
        distance.set_yscale("log")
        distance.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        distance.yaxis.set_minor_formatter(NullFormatter())
        for axes in (accuracy, distance):
            axes.set_xlabel("multiply-accumulates of an image, the plain pipeline with 25 steps = 1")
            axes.grid(alpha=0.3)
        handles, labels = accuracy.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _line(
    axes: Axes, method: str, style: dict[str, Any], points: Sequence[dict[str, Any]], values: list[float]
) -> None:
    axes.plot([point["macs"] for point in points], values, label=method, **{"linewidth": 1.8, "markersize": 8, **style})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.out)


if __name__ == "__main__":
    main()
