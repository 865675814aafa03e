"""The page that compares methods, and its plots."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import check_installed
from tgate_compile.study.comparison.result import Comparison, ImageFigures, MethodFigures, ModelFigures
from tgate_compile.study.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

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


#: Images of at most this side are shown with hard pixels and kept without loss.
_SMALL = 256
_WEBP_QUALITY = 90

_STRIP_WORDS = {
    "F": "everything computed, with guidance",
    "f": "everything computed, without guidance",
    "S": "self-attention reused, with guidance",
    "D": "deep part reused, with guidance",
    "d": "deep part reused, without guidance",
    "p": "cross-attention reused, without guidance",
    "P": "cross-attention reused, with guidance",
    "q": "cross- and self-attention reused, without guidance",
    "r": "cross-attention and deep part reused, without guidance",
}


def check_page_can_be_made() -> None:
    """See, before the work, that the page can be written after it.

    Raises:
        ConfigurationError: a package is missing.
    """
    check_installed("jinja2", "matplotlib", extra="plots", what="The page of a comparison")


def page_of(comparison: Comparison) -> str:
    """The HTML of the page."""
    import jinja2

    def text(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text("page.html.jinja")).render(
        style=text("page.css"),
        script=text("page.js"),
        command=comparison.command,
        machine=comparison.machine,
        models=[_model(f"model-{index}", model, comparison) for index, model in enumerate(comparison.models)],
        overview=_overview(comparison),
        strip_words={
            letter: words
            for letter, words in _STRIP_WORDS.items()
            if any(letter in method.strip for model in comparison.models for method in model.methods)
        },
    )


def _model(key: str, model: ModelFigures, comparison: Comparison) -> dict[str, Any]:
    if model.error is not None:
        return {"key": key, "name": model.name, "error": model.error}
    pictures = comparison.pictures[model.name]
    return {
        "key": key,
        "name": model.name,
        "error": None,
        "facts": _facts(model),
        "methods": [_method(f"{key}-{method.key}", model, method) for method in model.methods],
        "rows": [
            {
                "prompt": prompt,
                "cells": [
                    _cell(method, index, pictures.get(method.key, ()), row)
                    for index, method in enumerate(model.methods)
                ],
            }
            for row, prompt in enumerate(model.prompts)
        ],
        "plots": plots_of(model, key),
        "judged": any(method.right is not None for method in model.methods),
        "has_ssim": any(method.ssim is not None for method in model.methods),
    }


def _facts(model: ModelFigures) -> list[str]:
    setting = model.setting
    guidance = f"guidance {setting['guidance scale']}" if model.guided else "without guidance batches"
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
    if method.why_not is not None:
        return {"index": index, "title": method.title, "why_not": method.why_not}
    image = pictures[row]
    figures = method.images[row]
    return {
        "index": index,
        "title": f"{method.title}: {method.steps}" if method.key == "fewer_steps" else method.title,
        "why_not": None,
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


def _overview(comparison: Comparison) -> dict[str, Any]:
    """A table of methods by models."""
    models = [(f"model-{index}", model) for index, model in enumerate(comparison.models) if model.error is None]
    rows: dict[str, dict[str, Any]] = {}
    for key, model in models:
        for index, method in enumerate(model.methods):
            row = rows.setdefault(method.key, {"title": method.title, "index": index, "cells": {}})
            row["cells"][key] = None if method.why_not is not None else _overview_cell(model, method)
    return {"models": [{"key": key, "name": model.name} for key, model in models], "rows": list(rows.values())}


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
    """In words where the times are not to be believed."""
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
