"""The result of `evaluate` and its plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import read_schedule, schedule_data
from tgate_compile.study.evaluation.images import write_json
from tgate_compile.study.figures import INK, LINE, SOFT, aligned, new_figure, save_figure

# Okabe and Ito's palette, which is safe for all kinds of colour vision; the markers repeat the information.
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
    "accuracy": "images that match their captions",
    "frechet_to_drawings": "Frechet distance to drawn scenes",
    "frechet_to_plain": "Frechet distance to plain",
}


def draw_evaluation(evaluation: Evaluation, path: str | Path) -> None:
    """Write the plot of `evaluation` to `path`."""
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


#: Heading and number of digits of each measure, in the order of the table's columns.
HEADINGS: Mapping[str, tuple[str, int]] = {
    "cost": ("cost", 3),
    "drift": ("drift", 3),
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "clip_score": ("CLIP", 2),
    "fid": ("FID", 2),
    "fid_to_plain": ("FID to plain", 2),
    "accuracy": ("accuracy", 3),
    "frechet_to_drawings": ("Frechet", 2),
    "frechet_to_plain": ("Frechet to plain", 2),
}


@dataclass(frozen=True)
class EvaluationRow:
    """The measurements of one contender in an `Evaluation`.

    Attributes:
        label: name of the contender; the first row is `plain`.
        schedule: the schedule; None for the plain pipeline.
        steps: number of inference steps.
        images: number of images.
        strips: number of images by strip (one character per step).
        measures: measures by name; see below.

    Names of measures:
        cost: multiply-accumulates of the denoiser, relative to the plain pipeline.
        psnr, ssim, lpips, drift: similarity to the plain pipeline's image of the same prompt and noise. `drift` is that
            of the final latents, ||x - plain|| / ||plain||. PSNR is the mean over the images that differ.
        identical, drift_worst: number of images that do not differ, and largest drift.
        clip_score: alignment of image and prompt, measured with CLIP.
        accuracy, accuracy_minus_plain, lost, gained: fraction of images that show everything in their captions
            according to the attribute reader, its difference from the plain pipeline's, and the numbers of images that
            match their captions only in the plain pipeline, or only here.
        fid, fid_to_plain: Frechet Inception distance to the reference and to the plain pipeline's images.
        frechet_to_drawings, frechet_to_plain: Frechet distance of the attribute reader's features to drawn scenes of
            the captions and to the plain pipeline's images.
        ..._se: standard errors of means.

    Measures that could not be computed are missing; None means that the value is undefined.
    """

    label: str
    schedule: Schedule | None
    steps: int
    images: int
    strips: Mapping[str, int]
    measures: Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Print it for the table.

    Attributes:
        rows: the plain pipeline, then the contenders in the given order.
        not_measured: why a measure is missing, by measure.
        protocol: everything the numbers depend on: prompts, seeds, steps, the call, pipeline, scheduler and its
            configuration, dtype, digest of the weights, feature extractors, the reference, versions.
        remarks: remarks for the reader.
        folder: folder with images and results.
    """

    rows: tuple[EvaluationRow, ...]
    not_measured: Mapping[str, str]
    protocol: Mapping[str, Any]
    remarks: tuple[str, ...]
    folder: Path

    def __getitem__(self, label: str) -> EvaluationRow:
        """Return the row of a contender."""
        return next(row for row in self.rows if row.label == label)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [asdict(row) | {"schedule": row.schedule and schedule_data(row.schedule)} for row in self.rows]
        return {**asdict(self), "rows": rows, "folder": str(self.folder)}

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, self.as_dict())

    def plot(self, path: str | Path) -> None:
        """Plot each measure against cost, to a .png, .svg or .pdf file.

        Raises:
            ConfigurationError: matplotlib is not installed (`pip install 'tgate_compile[plots]'`), or the file cannot
                be written.
        """
        draw_evaluation(self, path)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path) -> Evaluation:
        """Create an evaluation from the result of `as_dict`."""
        rows = tuple(
            EvaluationRow(**{**row, "schedule": None if row["schedule"] is None else read_schedule(row["schedule"])})
            for row in data["rows"]
        )
        return cls(rows, data["not_measured"], data["protocol"], tuple(data["remarks"]), folder)

    @property
    def shown(self) -> tuple[str, ...]:
        """The measures that are shown in the table."""
        found = set().union(*(row.measures for row in self.rows))
        return tuple(name for name in HEADINGS if name in found)

    def cells(self, row: EvaluationRow) -> tuple[str, ...]:
        """Return the measures of `row` as text, for the table."""
        return tuple(_shown(row.measures.get(name), HEADINGS[name][1]) for name in self.shown)

    def __str__(self) -> str:
        headings = ("", *(HEADINGS[name][0] for name in self.shown))
        lines = aligned([headings, *((row.label, *self.cells(row)) for row in self.rows)])
        missing = [f"not measured: {name}: {reason}" for name, reason in self.not_measured.items()]
        return "\n".join([*lines, *missing, *self.remarks])


def mean_and_error(values: Sequence[float], name: str) -> dict[str, float | None]:
    """Return the mean of `values` and its standard error; None for a value that is undefined."""
    if not values:
        return {name: None, f"{name}_se": None}
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {name: mean, f"{name}_se": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {name: mean, f"{name}_se": math.sqrt(variance / len(values))}


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def decibels(square_error: float) -> float | None:
    """Return the peak signal-to-noise ratio in dB for a mean squared error of pixels in [0, 1]; None for 0."""
    return -10 * math.log10(square_error) if square_error else None
