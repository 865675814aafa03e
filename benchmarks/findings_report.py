"""Writes the tables of `findings.py`'s results into a page, and draws them.

    python benchmarks/findings_report.py docs/results/findings.json --page docs/evidence/findings.md \\
        --plot docs/results/findings.png

The page has each table between `<!-- findings: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from quality_plot import STYLES

Results = Mapping[str, Any]

MSG_NO_TABLE = "the page asks for a table called {name!r}; there are: {known}"

_PLACE = re.compile(r"(<!-- findings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MODELS = ("sd", "sdxl", "pixart", "lcm")
#: What a contender is called in the tables, where it is not its label.
_TITLES = {"plain": "plain", "T-GATE v2 10": "T-GATE v2, gate 10, `sp_interval=5`"}


def render(page: str, results: Results) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: it asks for a table that there is not.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(MSG_NO_TABLE.format(name=name, known=", ".join(TABLES)))
        return f"{match[1]}\n{TABLES[name](results)}\n\n{match[3]}"

    return _PLACE.sub(table, page)


def _of_models(results: Results) -> str:
    """Table 1's costs: parameters and multiply-accumulates of a step, in full and after the gate."""
    heading = ("model", "scheduler", "parameters / M", "after the gate / M", "step / M MACs", "after the gate / M MACs")
    rows = []
    for name in _MODELS:
        if (model := results["models"].get(name)) is not None:
            millions = ("parameters", "parameters_pruned", "full_step_macs", "pruned_step_macs")
            rows.append(
                (
                    f"`{name}`",
                    model["scheduler"].removesuffix("Scheduler"),
                    *(f"{model[m] / 1e6:.2f}" for m in millions),
                )
            )
    return _markdown(heading, rows, left=2)


def _gates(results: Results) -> str:
    """Table 1: gates on each model."""
    found = []
    for model in _MODELS:
        for name, setting in results["settings"].items():
            if setting["model"] == model and name in (f"{model}, 25 steps", f"{model}, 4 steps"):
                gates = sorted(filter(_is_gate, setting["rows"]), key=lambda label: int(label.partition(" ")[2] or 0))
                found += [(f"`{model}`", setting, label) for label in gates]
    return _measures(("model", ""), [((model, _title(label)), s, label) for model, s, label in found], results)


def _is_gate(label: str) -> bool:
    return label == "plain" or re.fullmatch(r"T-GATE \d+", label) is not None


def _steps(results: Results) -> str:
    """The table of steps: gate 10 in all of them, and a gate at 40 %."""
    rows = []
    for steps in (15, 25, 50, 100):
        setting = results["settings"].get(f"sdxl, {steps} steps")
        if setting is not None:
            labels = ["plain", "T-GATE 10", f"T-GATE {round(0.4 * steps)}", *_fewer(setting)]
            chosen = [label for label in dict.fromkeys(labels) if label in setting["rows"]]
            rows += [((f"{steps}", _title(label)), setting, label) for label in chosen]
    return _measures(("steps", ""), rows, results)


def _fewer(setting: Results) -> list[str]:
    """The plain pipeline in as many steps as cost what T-GATE with gate 10 costs."""
    cost = setting["rows"]["T-GATE 10"]["cost"]
    return [s for s in setting["rows"] if s.endswith(" steps") and abs(setting["rows"][s]["cost"] - cost) < 0.03]


def _schedulers(results: Results) -> str:
    """The table of schedulers: the models' own, which is DPM++ 2M, and two others."""
    rows = []
    for model in ("sd", "sdxl"):
        for scheduler in ("", ", Euler", ", DDIM"):
            setting = results["settings"].get(f"{model}, 25 steps{scheduler}")
            other = results["settings"].get(f"{model}, 25 steps, Euler")
            if setting is not None and other is not None:
                title = f"`{model}`, {scheduler.removeprefix(', ') or 'DPM++ 2M'}"
                chosen = [label for label in other["rows"] if label in setting["rows"]]
                rows += [((title, _title(label)), setting, label) for label in chosen]
    return _measures(("", ""), rows, results)


def _methods(results: Results) -> str:
    """Table of methods: everything that was measured on a model with its own scheduler and steps."""
    rows = []
    for model in _MODELS:
        for name in (f"{model}, 25 steps", f"{model}, 4 steps"):
            if name in results["settings"]:
                setting = results["settings"][name]
                by_cost = sorted(setting["rows"], key=lambda label: -setting["rows"][label]["cost"])
                rows += [((f"`{model}`", _title(label)), setting, label) for label in by_cost]
    return _measures(("model", ""), rows, results)


def _title(label: str) -> str:
    if label in _TITLES:
        return _TITLES[label]
    return re.sub(r"T-GATE (\d)", r"T-GATE, gate \1", label).replace("DeepCache 3", "DeepCache, every 3rd")


def _measures(heading: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], Results, str]], results: Results) -> str:
    """Cost and quality; a row's title is left out where it is that of the row before."""
    images = results["images"]
    columns = (
        "MACs", f"pairs / %, n = {images['of_pairs']}", f"singles / %, n = {images['of_singles']}", "lost, gained",
        "Fréchet", "PSNR / dB",
    )  # fmt: skip
    lines = []
    before = ""
    for (first, second), setting, label in rows:
        row = setting["rows"][label]
        lines.append(
            (
                "" if first == before else first, second, f"{row['cost']:.3f}", _spread(row, "pairs", 1),
                _spread(row, "singles", 1), "" if label == "plain" else f"{row['lost']}, {row['gained']}",
                _spread(row, "frechet", 1), _spread(row, "psnr", 1),
            )
        )  # fmt: skip
        before = first
    return _markdown((*heading, *columns), lines, left=len(heading))


def _spread(row: Results, measure: str, digits: int) -> str:
    if measure not in row:
        return ""
    return f"{row[measure]['mean']:.{digits}f} ± {row[measure]['sd']:.{digits}f}"


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(heading))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, rule, *rows))


TABLES: Mapping[str, Callable[[Results], str]] = {
    "models": _of_models,
    "gates": _gates,
    "steps": _steps,
    "schedulers": _schedulers,
    "methods": _methods,
}


@dataclass(frozen=True)
class _Line:
    """A method's points in the plot: the labels that begin with `prefix` and fit `pattern`."""

    style: str
    pattern: str


_LINES = (
    _Line("fewer steps", r"(\d+) steps"),
    _Line("guidance drop", r"guidance drop (\d+)"),
    _Line("T-GATE", r"T-GATE (\d+)"),
    _Line("T-GATE, cond cached", r"T-GATE (\d+), cond cached"),
    _Line("T-GATE v2", r"T-GATE v2 (\d+)"),
    _Line("DeepCache", r"DeepCache (3)"),
    _Line("DeepCache + T-GATE", r"DeepCache 3 \+ T-GATE (\d+)"),
)


def draw(results: Results, path: Path) -> None:
    """A column per model: wrong pairs, and Frechet distance, over multiply-accumulates."""
    names = [n for m in _MODELS for n in (f"{m}, 25 steps", f"{m}, 4 steps") if n in results["settings"]]
    with plt.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(2, len(names), figsize=(4.6 * len(names), 9), layout="constrained", squeeze=False)
        for column, name in enumerate(names):
            rows = results["settings"][name]["rows"]
            for axes, measure, title in zip(
                panels[:, column],
                ("pairs", "frechet"),
                ("pairs right / %", "Fréchet distance to drawings"),
                strict=True,
            ):
                _panel(axes, rows, measure)
                if column == 0:
                    axes.set_ylabel(title)
            panels[0, column].set_title(f"embedded {name}", loc="left", fontsize=13)
            panels[1, column].set_xlabel("MACs of an image; plain = 1")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        images = results["images"]
        figure.suptitle(
            f"Means of {len(images['seeds'])} seeds, {images['each']} captions each; bars: their spread",
            fontsize=13,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)
        plt.close(figure)


def _panel(axes: Axes, rows: Results, measure: str) -> None:
    plain = rows["plain"][measure]
    axes.axhspan(plain["mean"] - plain["sd"], plain["mean"] + plain["sd"], color="black", alpha=0.08, linewidth=0)
    axes.axhline(plain["mean"], color="black", linewidth=1.0)
    axes.plot([1.0], [plain["mean"]], marker="o", color="black", label="plain", linestyle="none", markersize=8)
    for line in _LINES:
        style = STYLES[line.style]
        found = [(rows[label], m) for label in rows if (m := re.fullmatch(line.pattern, label))]
        found.sort(key=lambda pair: float(pair[0]["cost"]))
        if not found:
            continue
        axes.errorbar(
            [row["cost"] for row, _ in found],
            [row[measure]["mean"] for row, _ in found],
            yerr=[row[measure]["sd"] for row, _ in found],
            label=re.sub(r" \(.*", "", style.title),
            color=style.colour, marker=style.marker, markersize=12 if style.marker == "*" else 8,
            linestyle=style.line or "none", linewidth=1.6, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axes.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, help="a page whose tables are written anew")
    parser.add_argument("--plot", type=Path, help="a picture")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if options.page is not None:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(render(page, results), encoding="utf-8")
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
