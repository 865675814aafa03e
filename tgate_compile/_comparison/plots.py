"""The page's plots: SVG by matplotlib whose colours are the page's own, so that they follow its light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgate_compile._comparison.result import MethodFigures, ModelFigures
from tgate_compile._figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that are in the SVG once it is written, and then become the page's colours.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_FIRST_METHOD = 0x10
_MARKERS = ("o", "^", "v", "s", "D", "P", "X")
_SIZE = (4.3, 3.0)  # inches


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: what it shows.
        note: how to read it.
        svg: the element.
    """

    title: str
    note: str
    svg: str


def plots_of(model: ModelFigures, prefix: str) -> list[Plot]:
    """Of one model; `prefix` makes the names inside the SVG elements the page's only ones."""
    ran = [(index, method) for index, method in enumerate(model.methods) if method.why_not is None]
    plots = [
        Plot(
            "Quality against cost",
            "Left is cheaper, down is closer to the plain images.",
            _svg(_draw_quality(model, ran), f"{prefix}-quality"),
        ),
        Plot(
            "Time per step",
            "Of each denoiser call, the median over the images. The first one includes the text encoder.",
            _svg(_draw_time(ran), f"{prefix}-time"),
        ),
    ]
    if model.convergence:
        note = "How much the cross-attentions' outputs change from step to step, plain, first prompt; dashed: the gate."
        plots.append(Plot("Convergence", note, _svg(_draw_convergence(model), f"{prefix}-convergence")))
    return plots


def _draw_quality(model: ModelFigures, ran: Sequence[tuple[int, MethodFigures]]) -> Figure:
    figure, axes = _axes("operations of the denoiser, plain = 1", "drift of the final latents")
    for index, method in ran:
        cost, drifts = model.cost(method), [image.drift for image in method.images]
        if cost is not None and method.drift is not None:
            axes.plot([cost, cost], [min(drifts), max(drifts)], color=_colour(index), linewidth=1.2, alpha=0.45)
            axes.plot([cost], [method.drift], color=_colour(index), marker=_MARKERS[index], markersize=8, linewidth=0)
    axes.set_xlim(0, 1.06)
    axes.set_ylim(bottom=-0.01)
    return figure


def _draw_time(ran: Sequence[tuple[int, MethodFigures]]) -> Figure:
    figure, axes = _axes("denoiser call", "milliseconds")
    for index, method in ran:
        times = [1e3 * seconds for seconds in method.step_seconds]
        axes.plot(times, color=_colour(index), marker=_MARKERS[index], markersize=3.5, linewidth=1.2)
    axes.set_ylim(bottom=0)
    return figure


def _draw_convergence(model: ModelFigures) -> Figure:
    figure, axes = _axes("step", "relative change")
    axes.plot(range(1, len(model.convergence) + 1), model.convergence, color=_colour(1), marker="o", markersize=3.5)
    axes.axvline(model.gate, color=_INK, linewidth=1.2, linestyle="--")
    axes.set_xlim(0, model.steps)
    axes.set_ylim(0, 1.08 * max(model.convergence))
    return figure


def _axes(across: str, up: str) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(*_SIZE)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(across, color=_SOFT, fontsize=10)
    axes.set_ylabel(up, color=_SOFT, fontsize=10)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=9.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=across != "operations of the denoiser, plain = 1"))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    return figure, axes


def _colour(index: int) -> str:
    return f"#0000{_FIRST_METHOD + index:02x}"


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an element for an HTML page."""
    import matplotlib as mpl

    written = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    for stand_in, colour in ((_INK, "ink"), (_SOFT, "soft"), (_LINE, "line")):
        text = text.replace(stand_in, f"var(--{colour})")
    return re.sub(r"#0000([12][0-9a-f])", lambda match: f"var(--method-{int(match[1], 16) - _FIRST_METHOD})", text)
