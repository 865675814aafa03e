"""An evaluation as a picture: each measure against cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tgate_compile._figures import INK, LINE, SOFT, new_figure, save_figure

if TYPE_CHECKING:
    from tgate_compile._evaluation.result import Evaluation

# Okabe and Ito's colours, for any colour vision; the markers say it once more.
_COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = ("*", "o", "s", "^", "D", "v", "P", "X", "<", ">")
_WORDS = {
    "drift": "drift of the final latents",
    "psnr": "PSNR to plain, dB",
    "ssim": "SSIM to plain",
    "lpips": "LPIPS to plain",
    "clip_score": "CLIP score",
    "fid": "FID to the reference",
    "fid_to_plain": "FID to plain",
    "accuracy": "images that show all that is asked",
    "frechet_to_drawings": "Frechet distance to drawn scenes",
    "frechet_to_plain": "Frechet distance to plain",
}


def draw_evaluation(evaluation: Evaluation, path: str | Path) -> None:
    """Write the picture of `evaluation` to `path`."""
    names = [name for name in _WORDS if name in evaluation.shown]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(3.3 * columns, 2.6 * lines + 0.25 * -(-len(evaluation.rows) // columns))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    costs = [cost for row in evaluation.rows if (cost := row.measures.get("cost")) is not None]
    for name, panel in zip(names, axes, strict=False):
        panel.set_xlim(min(costs) - 0.05, max(costs) + 0.05)
        panel.set_title(_WORDS[name], color=INK, fontsize=9, loc="left")
        panel.set_xlabel("cost, plain = 1", color=SOFT, fontsize=8)
        for index, row in enumerate(evaluation.rows):
            value, cost = row.measures.get(name), row.measures.get("cost")
            if value is None or cost is None:
                continue
            error = row.measures.get(f"{name}_se")
            panel.errorbar(
                [cost], [value], None if error is None else [error], color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)], markersize=6, linewidth=0, elinewidth=1.0, label=row.label,
            )  # fmt: skip
        panel.grid(color=LINE, linewidth=0.5)
        panel.set_axisbelow(True)
        panel.tick_params(colors=SOFT, labelsize=7, length=0)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(LINE)
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    labels = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower left", ncols=columns, fontsize=8, labelcolor=INK,
        frameon=False,
    )  # fmt: skip
    save_figure(figure, path)
