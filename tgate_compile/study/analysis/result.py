"""The result of `analyze` and its plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import Kind
from tgate_compile.study.analysis.measures import Attentions, Curve
from tgate_compile.study.figures import INK, LINE, SOFT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

# Okabe and Ito's palette, which is safe for all kinds of colour vision.
_COLOURS = {"cross": "#0072b2", "self": "#d55e00", "uncond": "#009e73", "cond": "#cc79a7", "all": "#0072b2"}
_NAMES = {"cross": "cross-attention", "self": "self-attention"}


def draw_analysis(analysis: Analysis, path: str | Path) -> None:
    """Write a figure of `analysis` with panels for each kind of attention, the halves, and the trajectories."""
    panels = len(analysis.kinds) + 1 + (analysis.trajectories is not None)
    rows = 1 if panels <= 3 else 2
    columns = -(-panels // rows)
    figure = new_figure(4.0 * columns, 2.7 * rows)
    figure.suptitle(_title(analysis), color=INK, fontsize=10, x=0.01, ha="left")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for kind, panel in zip(analysis.kinds, axes, strict=False):
        _draw_kind(panel, analysis, kind)
    _draw_halves(axes[len(analysis.kinds)], analysis)
    if analysis.trajectories is not None:
        _draw_trajectories(axes[len(analysis.kinds) + 1], analysis)
    for panel in axes[panels:]:
        panel.set_visible(False)
    for panel in axes[:panels]:
        panel.grid(color=LINE, linewidth=0.5)
        panel.set_axisbelow(True)
        panel.tick_params(colors=SOFT, labelsize=8, length=0)
        panel.set_xlim(0, analysis.num_steps)
        panel.set_ylim(bottom=0)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(LINE)
    save_figure(figure, path)


def draw_pictures(pictures: Mapping[str, Image], prompt: str, path: str | Path) -> None:
    """Write the images side by side: on the left with text in all steps, in the upper row with text in the first steps
    only, in the lower row with text in the last steps only."""
    names = {way: [name for name in pictures if name.startswith(f"S^{way}")] for way in ("F", "L")}
    columns = 1 + max(map(len, names.values()))
    figure = new_figure(1.35 * columns, 3.3)
    figure.suptitle(prompt, color=INK, fontsize=9, x=0.01, ha="left")
    grid = figure.subplots(2, columns, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    for row, (way, words) in enumerate((("F", "text before step {m}"), ("L", "text from step {m} on"))):
        grid[row][0].imshow(pictures["S"], interpolation="nearest")
        grid[row][0].set_title("text in all steps", color=SOFT, fontsize=7)
        for panel, name in zip(grid[row][1:], names[way], strict=False):
            panel.imshow(pictures[name], interpolation="nearest")
            panel.set_title(words.format(m=name.rpartition("_")[2]), color=SOFT, fontsize=7)
    save_figure(figure, path)


def _title(analysis: Analysis) -> str:
    images = max(1, len(analysis.prompts)) * len(analysis.seeds)
    return (
        f"{analysis.setting['pipeline']}, {analysis.num_steps} steps of {analysis.setting['scheduler']}, {images} image"
        f"{'s' if images > 1 else ''}"
    )


def _draw_kind(axes: Axes, analysis: Analysis, kind: str) -> None:
    attentions = next(value for key, value in analysis.kinds.items() if key == kind)
    axes.set_title(f"Change of {_NAMES[kind]} from step to step", color=INK, fontsize=9, loc="left")
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.set_ylabel("L2 difference", color=SOFT, fontsize=9)
    for site in attentions.sites.values():
        axes.plot(site.difference.steps, site.difference.mean, color=SOFT, linewidth=0.5, alpha=0.5)
    _draw_curve(axes, attentions.difference, _COLOURS[kind], f"mean of {len(attentions.sites)} sites")
    axes.plot([], [], color=SOFT, linewidth=0.5, label="each site")
    if kind == "cross" and analysis.gate is not None:
        axes.axvline(analysis.gate, color=INK, linewidth=1.0, linestyle="--")
        axes.text(
            analysis.gate, 0.6, f" gate {analysis.gate}: close to\n the floor from here on",
            color=INK, fontsize=8, va="top", transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.legend(fontsize=8, labelcolor=INK, loc="upper right", frameon=False)


def _draw_halves(axes: Axes, analysis: Analysis) -> None:
    axes.set_title("Norms of the outputs", color=INK, fontsize=9, loc="left")
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.set_ylabel("L2 norm, mean of the sites", color=SOFT, fontsize=9)
    for kind, attentions in analysis.kinds.items():
        for half, curve in attentions.norms.items():
            name = _NAMES[kind] if half == "all" else f"{_NAMES[kind]}, {half}"
            _draw_curve(axes, curve, _COLOURS[half], name, "-" if kind == "cross" else ":")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7, labelcolor=INK, loc="upper right", frameon=False, ncols=2)


def _draw_trajectories(axes: Axes, analysis: Analysis) -> None:
    assert analysis.trajectories is not None
    axes.set_title("Effect of the text in some of the steps", color=INK, fontsize=9, loc="left")
    axes.set_xlabel("m", color=SOFT, fontsize=9)
    axes.set_ylabel("drift of the final latents", color=SOFT, fontsize=9)
    _draw_curve(axes, analysis.trajectories.text_first, _COLOURS["cross"], "text before step m only", "-", "o")
    _draw_curve(axes, analysis.trajectories.text_last, _COLOURS["self"], "text from step m on only", "-", "s")
    axes.legend(fontsize=8, labelcolor=INK, loc="best", frameon=False)


def _draw_curve(axes: Axes, curve: Curve, colour: str, label: str, style: str = "-", marker: str = "") -> None:
    axes.plot(
        curve.steps, curve.mean, color=colour, linewidth=1.4, linestyle=style, marker=marker, markersize=4, label=label
    )
    low = [max(m - s, 0.0) for m, s in zip(curve.mean, curve.spread, strict=True)]
    high = [m + s for m, s in zip(curve.mean, curve.spread, strict=True)]
    axes.fill_between(curve.steps, low, high, color=colour, alpha=0.15, linewidth=0)


@dataclass(frozen=True)
class Trajectories:
    """Drifts of generations with text in some steps only from S, which starts from the same noise with text in all.

    The drift is ||x - S|| / ||S|| of the final latents.

    Source: arXiv 2404.02747 v1, figure 3.

    Attributes:
        text_first: drift of S^F_m, with the null text from step m on, by m.
        text_last: drift of S^L_m, with the null text before step m, by m.
    """

    text_first: Curve
    text_last: Curve


@dataclass(frozen=True)
class Analysis:
    """The result of `analyze`. Print it for a summary, `save` it as JSON, or `plot` it.

    Attributes:
        kinds: convergence of the cross-attentions and self-attentions, by kind.
        trajectories: effect of the text in the first and last steps; None if it could not be measured.
        gate: first step from which on the mean change of the cross-attentions stays close to its floor, that is, within
            a fraction `converged_within` of the range from its smallest to its largest value; None if it never does.
            This shows when cached outputs would still be accurate, not how reusing them affects the images; `tune`
            measures that.
        converged_within: see `gate`.
        num_inference_steps: number of steps passed to the pipeline's call.
        num_steps: number of steps that the call makes.
        prompts: the prompts, if given.
        seeds: seeds of the noise for each prompt.
        call: further arguments of the call, as text.
        setting: classes of pipeline, denoiser and scheduler, device, dtype and versions.
        remarks: remarks for the reader.
        pictures: images of the first prompt, by "S", "S^F_10", "S^L_10", ...; empty unless requested.
    """

    kinds: Mapping[Kind, Attentions]
    trajectories: Trajectories | None
    gate: int | None
    converged_within: float
    num_inference_steps: int
    num_steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, str]
    setting: Mapping[str, str]
    remarks: tuple[str, ...]
    pictures: Mapping[str, Image] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the pictures."""
        trajectories = None if self.trajectories is None else asdict(self.trajectories)
        others = {
            name: value for name, value in vars(self).items() if name not in ("kinds", "trajectories", "pictures")
        }
        kinds = {kind: asdict(attentions) for kind, attentions in self.kinds.items()}
        return {**others, "kinds": kinds, "trajectories": trajectories}

    def save(self, path: str | Path) -> None:
        """Write everything except the pictures as JSON.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"The analysis cannot be written to {path}: {error.strerror or error}.") from error

    def plot(self, path: str | Path) -> None:
        """Draw the convergence, the norms and the trajectories, to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: matplotlib is not installed (`pip install 'tgate_compile[plots]'`), or the file cannot
                be written.
        """
        draw_analysis(self, path)

    def plot_pictures(self, path: str | Path) -> None:
        """Draw the first prompt's images with text in some of the steps, to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: no pictures were made, matplotlib is not installed, or the file cannot be written.
        """
        if not self.pictures:
            raise ConfigurationError("This analysis has no pictures. Call analyze(..., pictures=True).")
        draw_pictures(self.pictures, self.prompts[0] if self.prompts else "", path)

    def __str__(self) -> str:
        images = max(1, len(self.prompts)) * len(self.seeds)
        lines = [
            f"{self.setting['pipeline']}, {self.num_steps} steps of {self.setting['scheduler']}, {images} "
            f"image{'s' if images > 1 else ''}",
            self.gist,
        ]
        for kind, attentions in self.kinds.items():
            changes = attentions.relative
            shown = ", ".join(f"{s}: {m:.3f}" for s, m in zip(changes.steps, changes.mean, strict=True))
            lines.append(f"{kind}-attention, relative change at step {shown}")
        if self.trajectories is not None:
            for name, curve in (("S^F", self.trajectories.text_first), ("S^L", self.trajectories.text_last)):
                shown = ", ".join(f"{m}: {d:.3f}" for m, d in zip(curve.steps, curve.mean, strict=True))
                lines.append(f"{name}_m, drift from S by m {shown}")
        return "\n".join([*lines, *self.remarks])

    @property
    def gist(self) -> str:
        """One sentence about what the convergence suggests."""
        if self.gate is None:
            return (
                "The cross-attentions do not converge: their change does not stay within "
                f"{self.converged_within:g} of the range from its smallest to its largest value."
            )
        return (
            f"From step {self.gate} on, the change of the cross-attentions stays close to its floor, which suggests "
            f"gate step {self.gate}. Use `tune` to measure the effect on the images."
        )
