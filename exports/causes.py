"""The one line of a converter's or runtime's error that says what was wrong."""

from __future__ import annotations

import re

from tgate_compile._errors import TGateError

#: Lines of OpenVINO's that say where in its source an error was raised.
_PLACES = re.compile(r"^(Exception from |Check .* failed at |While validating |Error loading )")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def cause_of(error: BaseException) -> str:
    """What `error` goes back to, on one line.

    torch.onnx wraps it in general advice, and OpenVINO puts places in its own source before it.
    Of an error of this library it is the text alone, else the class as well.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not _PLACES.match(line)] or lines or [""]
    line = telling[0].rstrip(".")
    return line if isinstance(error, TGateError) else f"{type(error).__name__}: {line}"
