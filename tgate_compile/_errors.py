"""The library's exceptions, the causes of other libraries' exceptions, and checks for missing packages."""

from __future__ import annotations

import importlib.util
import re

#: The last sentence of messages about pipelines and calls that cannot be gated.
INSTEAD = 'What works instead: the pipeline without tgate_compile, or optimize(..., on_unsupported="plain").'


class TGateError(Exception):
    """Base class of the library's errors."""


class ConfigurationError(TGateError, ValueError):
    """An argument is wrong. The message states what was given, what was expected and how to fix it."""


class UnsupportedModelError(TGateError):
    """The pipeline or denoiser cannot be gated. The message states the reason and what works instead."""


class UnsupportedCallError(UnsupportedModelError, ConfigurationError):
    """A call cannot be gated with its arguments. The message states the reason and what to change."""


class CaptureError(TGateError, RuntimeError):
    """The denoiser could not be captured as a graph."""


class BackendError(TGateError, RuntimeError):
    """A backend could not compile a graph."""


class VerificationError(TGateError, RuntimeError):
    """A rewritten graph is not valid. This is a bug in tgate_compile: please report it."""


class ConcurrentGenerationError(TGateError, RuntimeError):
    """A second generation was started on a denoiser that is in the middle of one."""


class BundleError(TGateError, RuntimeError):
    """A bundle cannot be written, is damaged, or does not belong to the pipeline, as the message states."""


def first_line(error: BaseException, *, named: bool = False) -> str:
    """Return the first line of another package's error, without its full stop; `named` prepends the error's class.

    For an error without a message it is the name of the class.
    """
    name = type(error).__name__
    line = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
    if not line:
        return name
    return f"{name}: {line}" if named else line


#: Additions to the message of `check_installed`, by extra.
HINTS = {
    "onnx": " (or 'tgate_compile[onnx-gpu]' on a machine with an NVIDIA GPU)",
    "tensorrt": ", which fetches NVIDIA's packages from NVIDIA's own index",
}


def is_installed(*modules: str) -> bool:
    """Return whether all of these modules are installed."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def check_installed(*modules: str, extra: str = "onnx", what: str = "ONNX") -> None:
    """Raise ConfigurationError, with the command to install them, unless all of these modules are installed."""
    missing = ", ".join(name for name in modules if not is_installed(name))
    if missing:
        raise ConfigurationError(
            f"{what} needs packages that are not installed: {missing}. Run: pip install "
            f"'tgate_compile[{extra}]'{HINTS.get(extra, '')}."
        )


#: Lines of OpenVINO's errors that only locate the error in OpenVINO's source.
_PLACES = re.compile(r"^(Exception from |Check .* failed at |While validating |Error loading )")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def cause_of(error: BaseException) -> str:
    """Return the root cause of `error` on one line.

    torch.onnx wraps the cause in general advice, and OpenVINO puts locations in its source code before it. For an error
    of this library the result is the message alone; otherwise the error's class precedes it.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not _PLACES.match(line)] or lines or [""]
    line = telling[0].rstrip(".")
    return line if isinstance(error, TGateError) else f"{type(error).__name__}: {line}"
