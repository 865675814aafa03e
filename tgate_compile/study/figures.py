"""Write figures to files, and draw schedules as strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import DECIDED, REUSED, Kind, Method, Phase
from tgate_compile.methods.schedule import Schedule, schedule_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1c20"
SOFT = "#6a707a"
LINE = "#d9dce1"


FORMATS = (".pdf", ".png", ".svg")
_DPI = 144


def aligned(rows: Sequence[tuple[str, ...]], *, texts: int = 1) -> list[str]:
    """Return the lines of a table whose first `texts` columns are aligned left and whose others are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:texts], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[texts:], widths[texts:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return lines


def check_figure(path: str | Path) -> None:
    """Check, before any work is done, that a figure can be written to `path`.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file name has an unsupported suffix.
    """
    _check_matplotlib()
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigurationError(
            f"The name of a picture must end in one of {', '.join(FORMATS)}, but got {str(path)!r}."
        )


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "Drawing pictures needs matplotlib, which is not installed. Run: pip install 'tgate_compile[plots]'."
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of the given size in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    _check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` in the format given by the suffix of `path`. Equal figures give equal bytes.

    Raises:
        ConfigurationError: the suffix is not in `FORMATS`, or the file cannot be written.
    """
    check_figure(path)
    target = Path(path)
    # Dates and matplotlib's version would make every file different.
    without: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
    }
    try:
        figure.savefig(target, dpi=_DPI, metadata=without[target.suffix.lower()])
    except OSError as error:
        raise ConfigurationError(f"The picture {target} cannot be written: {error.strerror or error}.") from error


# Okabe and Ito's palette, which is safe for all kinds of colour vision; the letters repeat the information.
_LOOKS: Mapping[frozenset[Kind], tuple[str, str]] = {
    frozenset(): ("#0072b2", "white"),
    frozenset({"self"}): ("#56b4e9", INK),
    frozenset({"deep"}): ("#009e73", "white"),
    frozenset({"cross"}): ("#e69f00", INK),
    frozenset({"cross", "self"}): ("#d55e00", "white"),
    frozenset({"cross", "deep"}): ("#cc79a7", INK),
}
#: All other combinations of reused values share this colour and differ in their letters.
_OTHER_LOOK = ("#999999", INK)
_PHASES = [
    *(Phase(guided, reuse=reuse) for reuse in REUSED for guided in (True, False)),
    *(Phase(guided, reuse=reuse, decided=decided) for reuse, decided in DECIDED for guided in (True, False)),
    Phase(False, estimated=True),
]
#: The phases by the characters of strips.
BY_LETTER: Mapping[str, Phase] = {phase.character: phase for phase in _PHASES}

_CELL = 0.27  # inches
_ROW = 0.36


def strip_picture(rows: Mapping[str, Schedule | Method | str], path: str | Path, *, num_steps: int = 25) -> None:
    """Draw schedules below one another, with a coloured cell per step; steps without guidance have half the height.

    Args:
        rows: schedules or strips (`"FFFFpppp"`, as in `describe(pipe).strip`), by label.
        path: the .png, .svg or .pdf file to write.
        num_steps: number of steps to draw for schedules; a strip has one step per letter.

    Raises:
        ConfigurationError: a strip has unknown letters, matplotlib is not installed, or the file cannot be written.
    """
    if not isinstance(rows, Mapping) or not rows:
        raise ConfigurationError(
            f"strip_picture() needs a mapping from labels to schedules or strips, but got {rows!r}."
        )
    strips = {label: _strip(label, row, num_steps) for label, row in rows.items()}
    save_figure(_draw(strips), path)


def _strip(label: str, row: Schedule | Method | str, num_steps: int) -> str:
    if isinstance(row, (Schedule, Method)):
        return schedule_of(row).strip(num_steps)
    if not isinstance(row, str) or not row or not set(row) <= set(BY_LETTER):
        raise ConfigurationError(f"{label!r}: a strip consists of the letters {' '.join(BY_LETTER)}, but got {row!r}.")
    return row


def _draw(strips: Mapping[str, str]) -> Figure:
    steps = max(map(len, strips.values()))
    letters = set("".join(strips.values()))
    legend = [phase for phase in _PHASES if phase.character in letters]
    label_width = 0.095 * max(map(len, strips)) + 0.2
    legend_columns = max(1, int((label_width + _CELL * steps) / 2.1))
    legend_rows = -(-len(legend) // legend_columns)
    figure = new_figure(
        max(label_width + _CELL * steps, 2.4) + 0.2, _ROW * len(strips) + 0.3 + 0.24 * legend_rows + 0.35
    )
    axes = figure.add_subplot()
    for row, strip in enumerate(strips.values()):
        for step, letter in enumerate(strip):
            _draw_cell(axes, step, row, BY_LETTER[letter])
    axes.set_xlim(-0.1, steps + 0.1)
    axes.set_ylim(len(strips), 0)
    axes.set_yticks([row + 0.5 for row in range(len(strips))], list(strips), color=INK)
    every = 1 if steps <= 12 else 5 if steps <= 60 else 10
    shown = range(0, steps, every)
    axes.set_xticks([step + 0.5 for step in shown], [str(step) for step in shown], color=SOFT, fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("step; half the height: no guidance, half the batch", color=SOFT, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_legend(figure, legend, legend_columns)
    return figure


def _draw_cell(axes: Axes, step: int, row: int, phase: Phase) -> None:
    from matplotlib.patches import Rectangle

    fill, ink = _LOOKS.get(phase.reuse | phase.decided, _OTHER_LOOK)
    # Half the height, because the denoiser runs on half the batch without guidance.
    top = row + (0.06 if phase.guided else 0.48)
    height = row + 0.94 - top
    axes.add_patch(Rectangle((step + 0.04, top), 0.92, height, facecolor=fill, edgecolor=LINE, linewidth=0.4))
    axes.text(step + 0.5, top + height / 2, phase.character, color=ink, fontsize=7, ha="center", va="center_baseline")


def _guidance_of(phase: Phase) -> str:
    if phase.estimated:
        return ", uncond estimated"
    return "" if phase.guided else ", no guidance"


def _draw_legend(figure: Figure, phases: list[Phase], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=_LOOKS.get(phase.reuse | phase.decided, _OTHER_LOOK)[0],
            edgecolor=LINE,
            label=f"{phase.character}  {phase.name}{_guidance_of(phase)}",
        )
        for phase in phases
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, labelcolor=INK,
        handlelength=1.0, handleheight=0.9, columnspacing=1.4,
    )  # fmt: skip
