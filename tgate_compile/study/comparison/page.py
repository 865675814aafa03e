"""Render the HTML page of a comparison, with its plots."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import check_installed
from tgate_compile.methods.method import Kind
from tgate_compile.study.bench.methods import COMPARED, PLAIN
from tgate_compile.study.comparison.result import Comparison, ImageFigures, MethodFigures, ModelFigures
from tgate_compile.study.figures import BY_LETTER, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Placeholders in the written SVG, which are then replaced by the page's colours.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_FIRST_METHOD = 0x10
#: The number of colours for methods in the page's style.
COLOURS = 16
_MARKERS = ("o", "^", "v", "s", "D", "P", "X")
_SIZE = (4.3, 3.0)  # inches


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        title: title of the plot.
        note: how to read the plot.
        svg: the SVG element.
    """

    title: str
    note: str
    svg: str


def plots_of(model: ModelFigures, prefix: str, looks: Mapping[str, int]) -> list[Plot]:
    """Return the plots of one model.

    `prefix` makes the ids inside the SVG elements unique on the page. `looks` has a number for each method, from which
    its colour and marker follow.
    """
    ran = [(looks[method.key], method) for method in model.methods if method.why_not is None]
    plots = [
        Plot(
            "Quality against cost",
            "Further left is cheaper; further down is closer to the plain images.",
            _svg(_draw_quality(model, ran), f"{prefix}-quality"),
        ),
        Plot(
            "Time per step",
            "Median over the images, for each denoiser call. The first call includes the text encoder.",
            _svg(_draw_time(ran), f"{prefix}-time"),
        ),
    ]
    if model.convergence:
        note = (
            "Change of the cross-attention outputs from step to step, plain pipeline, first prompt; dashed: the gate."
        )
        plots.append(Plot("Convergence", note, _svg(_draw_convergence(model), f"{prefix}-convergence")))
    return plots


def _draw_quality(model: ModelFigures, ran: Sequence[tuple[int, MethodFigures]]) -> Figure:
    figure, axes = _axes("operations of the denoiser, plain = 1", "drift of the final latents")
    for index, method in ran:
        cost, drifts = model.cost(method), [image.drift for image in method.images]
        if cost is not None and method.drift is not None:
            style: dict[str, Any] = {"color": _colour(index)}
            axes.plot([cost, cost], [min(drifts), max(drifts)], linewidth=1.2, alpha=0.45, gid=f"of-{index}-a", **style)
            axes.plot(
                [cost], [method.drift], marker=_marker(index), markersize=8, linewidth=0, gid=f"of-{index}-b", **style
            )
    axes.set_xlim(0, 1.06)
    axes.set_ylim(bottom=-0.01)
    return figure


def _draw_time(ran: Sequence[tuple[int, MethodFigures]]) -> Figure:
    figure, axes = _axes("denoiser call", "milliseconds")
    for index, method in ran:
        times = [1e3 * seconds for seconds in method.step_seconds]
        style: dict[str, Any] = {"marker": _marker(index), "markersize": 3.5, "linewidth": 1.2}
        axes.plot(times, color=_colour(index), gid=f"of-{index}-a", **style)
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
    return f"#0000{_FIRST_METHOD + index % COLOURS:02x}"


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def looks_of(comparison: Comparison) -> dict[str, int]:
    """Return the number of the colour and the marker of each method, which is the same for all models."""
    keys = dict.fromkeys(method.key for model in comparison.models for method in model.methods)
    ordered = sorted(keys, key=lambda key: (PLAIN, *COMPARED, key).index(key))  # stable: those of files come last
    return {key: index for index, key in enumerate(ordered)}


def _svg(figure: Figure, prefix: str) -> str:
    """Return the figure as an SVG element for an HTML page."""
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
    return re.sub(r"#0000(1[0-9a-f])", lambda match: f"var(--method-{int(match[1], 16) - _FIRST_METHOD})", text)


#: Images with sides of at most this many pixels are shown without smoothing and stored losslessly.
_SMALL = 256
_WEBP_QUALITY = 90

_REUSED_WORDS: Mapping[Kind, str] = {
    "cross": "cross-attention",
    "self": "self-attention",
    "temporal": "temporal attention",
    "deep": "deep part",
    "ff": "feed-forward",
    "blocks": "blocks",
    "rear": "rear blocks",
    "reference": "reference images",
}


def _strip_words(letter: str) -> str:
    """Return what a step with this character in a strip does."""
    phase = BY_LETTER[letter]
    guidance = "guidance estimated" if phase.estimated else "with guidance" if phase.guided else "without guidance"
    if phase.decided:
        return f"blocks reused for one half of guidance only, {guidance}"
    reused = [words for kind, words in _REUSED_WORDS.items() if kind in phase.reuse]
    return f"{' and '.join(reused)} reused, {guidance}" if reused else f"everything computed, {guidance}"


def check_page_can_be_made() -> None:
    """Check, before any work is done, that the page can be rendered.

    Raises:
        ConfigurationError: a required package is not installed.
    """
    check_installed("jinja2", "matplotlib", extra="plots", what="The page of a comparison")


def page_of(comparison: Comparison) -> str:
    """Return the page as HTML."""
    import jinja2

    def text(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    looks = looks_of(comparison)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text("page.html.jinja")).render(
        style=text("page.css"),
        script=text("page.js"),
        command=comparison.command,
        machine=comparison.machine,
        models=[_model(f"model-{index}", model, comparison, looks) for index, model in enumerate(comparison.models)],
        overview=_overview(comparison, looks),
        colours=COLOURS,
        markers=len(_MARKERS),
        strip_words={
            letter: _strip_words(letter)
            for letter in BY_LETTER
            if any(letter in method.strip for model in comparison.models for method in model.methods)
        },
    )


def _model(key: str, model: ModelFigures, comparison: Comparison, looks: Mapping[str, int]) -> dict[str, Any]:
    if model.error is not None:
        return {"key": key, "name": model.name, "error": model.error}
    pictures = comparison.pictures[model.name]
    return {
        "key": key,
        "name": model.name,
        "error": None,
        "facts": _facts(model),
        "methods": [
            {"index": looks[method.key], **_method(f"{key}-{method.key}", model, method)} for method in model.methods
        ],
        "rows": [
            {
                "prompt": prompt,
                "cells": [
                    _cell(method, looks[method.key], pictures[method.key], row)
                    for method in model.methods
                    if method.why_not is None
                ],
            }
            for row, prompt in enumerate(model.prompts)
        ],
        "absent": [method.title for method in model.methods if method.why_not is not None],
        "plots": plots_of(model, key, looks),
        "judged": any(method.right is not None for method in model.methods),
        "has_ssim": any(method.ssim is not None for method in model.methods),
    }


def _facts(model: ModelFigures) -> list[str]:
    setting = model.setting
    guidance = f"guidance {setting['guidance scale']}" if model.guided else "no guidance"
    return [
        setting["pipeline"],
        f"{setting['denoiser']}, {model.parameters / 1e6:.1f} M parameters",
        f"{model.steps} steps of {setting['scheduler']}",
        guidance,
        f"gate at step {model.gate}",
        f"{setting['device']}, {setting['dtype']}, backend {setting['backend']}",
    ]


def _method(key: str, model: ModelFigures, method: MethodFigures) -> dict[str, Any]:
    about = {"key": key, "title": _title(model, method), "schedule": method.schedule, "why_not": method.why_not}
    if method.why_not is not None:
        return about
    cost = model.cost(method)
    ends_with = model.parameters if method.parameters_at_end is None else method.parameters_at_end
    right = method.right
    return about | {
        "strip": method.strip,
        "seconds": _seconds(method.seconds),
        "speedup": _speedup(model, method),
        "unreliable": model.why_unreliable(method) or "",
        "first": _seconds(method.first_call_seconds),
        "macs": "" if method.macs is None else _macs(method.macs),
        "cost": "" if cost is None else f"{cost:.3f}",
        "parameters": f"{ends_with / 1e6:.1f} M",
        "caches": _bytes(method.cache_bytes),
        "peak": _bytes(method.peak_bytes),
        "psnr": "" if method.psnr is None else f"{method.psnr:.1f} dB",
        "ssim": "" if method.ssim is None or method is model.plain else f"{method.ssim:.3f}",
        "drift": "" if method.drift is None or method is model.plain else f"{method.drift:.3f}",
        "right": "" if right is None else f"{right} of {len(method.images)}",
    }


def _title(model: ModelFigures, method: MethodFigures) -> str:
    return f"{method.steps} steps" if method.steps != model.steps else method.title


def _cell(method: MethodFigures, index: int, pictures: Sequence[Image], row: int) -> dict[str, Any]:
    image = pictures[row]
    figures = method.images[row]
    return {
        "index": index,
        "title": f"{method.title}: {method.steps}" if method.key == "fewer_steps" else method.title,
        "source": _data_uri(image),
        "width": image.width,
        "height": image.height,
        "hard": max(image.size) <= _SMALL,
        "likeness": _likeness(method, figures),
        "right": figures.right,
    }


def _likeness(method: MethodFigures, image: ImageFigures) -> str:
    if method.key == "plain":
        return "the reference"
    return "identical to plain" if image.psnr is None else f"{image.psnr:.1f} dB"


def _overview(comparison: Comparison, looks: Mapping[str, int]) -> dict[str, Any]:
    """Return the data of the table of methods by models."""
    models = [(f"model-{index}", model) for index, model in enumerate(comparison.models) if model.error is None]
    rows: dict[str, dict[str, Any]] = {}
    for key, model in models:
        for method in model.methods:
            row = rows.setdefault(method.key, {"title": method.title, "index": looks[method.key], "cells": {}})
            row["cells"][key] = None if method.why_not is not None else _overview_cell(model, method)
    return {
        "models": [{"key": key, "name": model.name} for key, model in models],
        "rows": sorted(rows.values(), key=lambda row: row["index"]),
    }


def _overview_cell(model: ModelFigures, method: MethodFigures) -> dict[str, Any]:
    cost = model.cost(method)
    words = [] if cost is None else [f"MACs {cost:.2f}"]
    if method is not model.plain and method.drift is not None:
        words.append(f"drift {method.drift:.2f}")
    if method.right is not None:
        words.append(f"{method.right}/{len(method.images)} right")
    unreliable = model.why_unreliable(method) or ""
    return {"speedup": _speedup(model, method), "unreliable": unreliable, "cost": cost or 0.0, "words": words}


def _speedup(model: ModelFigures, method: MethodFigures) -> str:
    """Return the speedup as text, or a remark if the times are unreliable."""
    if model.why_unreliable(method) is not None:
        return "time unreliable"
    speedup = model.speedup(method)
    return "" if speedup is None else f"{speedup:.2f}x"


def _data_uri(image: Image) -> str:
    buffer = io.BytesIO()
    lossless = max(image.size) <= _SMALL
    image.convert("RGB").save(buffer, format="WEBP", lossless=lossless, quality=_WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    if size == 0:
        return "none"
    if size < 1e5:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _macs(macs: float) -> str:
    return f"{macs / 1e9:.2f} G" if macs < 1e12 else f"{macs / 1e12:.2f} T"
