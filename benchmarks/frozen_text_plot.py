"""Plot the results of `frozen_text.py`: captions missed and PSNR against cost, with a line per method.

python benchmarks/frozen_text_plot.py docs/results/frozen_text.json docs/results/frozen_text_early.json \
    --out docs/results/frozen_text.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # write files without opening a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

#: Colour (Okabe and Ito's palette, which is safe for colour blindness), marker and line of each method.
STYLES: dict[str, tuple[str, str, str]] = {
    "steps": ("#555555", "o", "--"),
    "guidance ends": ("#0072B2", "s", "-"),
    "guidance ends, text frozen": ("#D55E00", "^", "-"),
    "guidance ends, text frozen, again every 5th": ("#E69F00", "v", ":"),
    "guidance ends, hidden states frozen": ("#A64D82", "D", ":"),
    "text frozen": ("#009E73", "*", "-"),
    "text frozen, again every 5th": ("#56B4E9", "X", ":"),
    "hidden states frozen": ("#6B5000", "P", "-"),
}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot missed captions and PSNR to the plain pipeline against cost, with a column per result file."""
    with plt.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure, columns = plt.subplots(
            2, len(results), figsize=(7 * len(results), 10), layout="constrained", sharex=True, squeeze=False
        )
        for result, (missed, distance) in zip(results, columns.T, strict=True):
            _panels(missed, distance, result)
        drawn = [axes.get_legend_handles_labels() for axes in columns[0]]
        titles = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
        figure.legend(list(titles.values()), list(titles), loc="outside lower center", ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)
        plt.close(figure)


def _panels(missed: Axes, distance: Axes, result: dict[str, Any]) -> None:
    rows: dict[str, dict[str, Any]] = result["rows"]
    for method, (colour, marker, line) in STYLES.items():
        points = sorted((row for label, row in rows.items() if _method(label) == method), key=lambda row: row["cost"])
        if not points:
            continue
        costs = [point["cost"] for point in points]
        title = "fewer steps" if method == "steps" else method
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": title, "linewidth": 1.6}
        missed.errorbar(costs, [_missed(p, result) for p in points], yerr=[_spread(p, result) for p in points], **style)
        psnr = [point["psnr"] for point in points]
        distance.errorbar(costs, [each["mean"] for each in psnr], yerr=[each["sd"] for each in psnr], **style)
    missed.axhline(_missed(rows["plain"], result), color="black", linewidth=1.2, zorder=0)
    missed.set_title(f"{_name(result)}\nimages that miss something / %", loc="left", fontsize=13)
    distance.set_title("PSNR to the plain pipeline's images / dB", loc="left", fontsize=13)
    distance.set_xlabel("multiply-accumulates; the plain pipeline with 25 steps = 1")
    for axes in (missed, distance):
        axes.grid(alpha=0.3)


def _name(result: dict[str, Any]) -> str:
    training = result["training"]
    model = "the shipped model" if training is None else f"after {training['steps']} steps of training"
    return f"{model}, guidance {result['guidance']:g}"


def _method(label: str) -> str:
    """Return the method of a row, such as `text frozen` of `text frozen at 10`."""
    return "steps" if label.endswith(" steps") else label.rpartition(" at ")[0]


def _missed(row: dict[str, Any], result: dict[str, Any]) -> float:
    """Return the share of images, of one or two objects, that do not show everything, in percent."""
    singles, pairs = result["singles"], result["pairs"]
    return float(100 - (singles * row["singles"]["mean"] + pairs * row["pairs"]["mean"]) / (singles + pairs))


def _spread(row: dict[str, Any], result: dict[str, Any]) -> float:
    """Return the standard deviation of that share over the seeds."""
    singles, pairs = result["singles"], result["pairs"]
    shares = [
        (singles * one + pairs * two) / (singles + pairs)
        for one, two in zip(row["singles"]["seeds"], row["pairs"]["seeds"], strict=True)
    ]
    mean = sum(shares) / len(shares)
    return float((sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)) ** 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw([json.loads(path.read_text()) for path in options.results], options.out)


if __name__ == "__main__":
    main()
