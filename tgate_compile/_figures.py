"""Figures in files, by matplotlib, which is an extra: no window, and no setting of it is changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1a1c20"
SOFT = "#6a707a"
LINE = "#d9dce1"

MSG_NEEDS_MATPLOTLIB = (
    "Pictures of schedules need matplotlib, and it is not installed. Run: pip install 'tgate_compile[plots]'."
)
MSG_FORMAT = "A picture is written as one of {known}, told by its name, but got {given!r}."
MSG_NOT_WRITTEN = "The picture {path} cannot be written: {reason}."

FORMATS = (".pdf", ".png", ".svg")
_DPI = 144


def check_figure(path: str | Path) -> None:
    """See, before the work, that a figure can be written to `path` after it.

    Raises:
        ConfigurationError: matplotlib is not installed, or the name tells no format that is written.
    """
    _check_matplotlib()
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigurationError(MSG_FORMAT.format(known=", ".join(FORMATS), given=str(path)))


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(MSG_NEEDS_MATPLOTLIB) from error


def new_figure(width: float, height: float) -> Figure:
    """A white figure of this size in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    _check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` in the format that the name tells. The same figure gives the same bytes.

    Raises:
        ConfigurationError: it is none of `FORMATS`, or the file cannot be written.
    """
    check_figure(path)
    target = Path(path)
    # The time and matplotlib's version would make each file another one.
    without: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
    }
    try:
        figure.savefig(target, dpi=_DPI, metadata=without[target.suffix.lower()])
    except OSError as error:
        raise ConfigurationError(MSG_NOT_WRITTEN.format(path=target, reason=error.strerror or error)) from error
