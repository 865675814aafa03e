"""What goes wrong: the library's exceptions, the cause of another library's, and packages that are missing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass

#: The last sentence of messages about what cannot be gated.
INSTEAD = 'What works instead: the pipeline without tgate_compile, or optimize(..., on_unsupported="plain").'


class TGateError(Exception):
    """Base class of the library's own errors."""


class ConfigurationError(TGateError, ValueError):
    """An argument is wrong: the message says what was given, what was expected and what to do."""


class UnsupportedModelError(TGateError):
    """The pipeline or denoiser cannot be gated: the message says why and what works instead."""


class UnsupportedCallError(UnsupportedModelError, ConfigurationError):
    """A call cannot be gated as it is made: the message says why and what to change."""


class CaptureError(TGateError, RuntimeError):
    """The denoiser could not be captured as a graph."""


class BackendError(TGateError, RuntimeError):
    """A backend could not compile a graph."""


class VerificationError(TGateError, RuntimeError):
    """A rewritten graph is not what it must be. This is a bug of ours: please report it."""


class ConcurrentGenerationError(TGateError, RuntimeError):
    """A second generation was started on a denoiser that is in the middle of one."""


class BundleError(TGateError, RuntimeError):
    """A bundle cannot be written, is damaged, or does not belong to the pipeline: the message says which."""


MSG_MISSING = (
    "{what} needs packages that are not installed: {missing}. Run: pip install 'tgate_compile[{extra}]'{hint}."
)

#: What else to say.
HINTS = {
    "onnx": " (or 'tgate_compile[onnx-gpu]' on a machine with an NVIDIA GPU)",
    "tensorrt": ", which fetches NVIDIA's packages from NVIDIA's own index",
}


@dataclass(frozen=True)
class Packages:
    """What something needs beyond the library itself.

    Attributes:
        modules: by the names that they are imported by.
        extra: of tgate_compile, which installs them.
    """

    modules: tuple[str, ...] = ()
    extra: str = ""


#: What the backends of `optimize` need.
BACKEND_PACKAGES: Mapping[str, Packages] = {
    "inductor": Packages(),
    "onnxruntime": Packages(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": Packages(("onnx", "onnxscript", "openvino"), "openvino"),
    "tensorrt": Packages(("torch_tensorrt", "tensorrt"), "tensorrt"),
    "eager": Packages(),
}
#: Those that `backend="auto"` takes on a CPU, the fastest first, by what is installed.
FASTEST_ON_CPU = ("openvino", "onnxruntime", "eager")


def is_installed(*modules: str) -> bool:
    """Whether all of these modules are there."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def check_installed(*modules: str, extra: str = "onnx", what: str = "ONNX") -> None:
    """Raise ConfigurationError, which says what to install, unless all of these modules are there."""
    missing = ", ".join(name for name in modules if not is_installed(name))
    if missing:
        raise ConfigurationError(MSG_MISSING.format(what=what, missing=missing, extra=extra, hint=HINTS.get(extra, "")))


def is_backend_installed(name: str) -> bool:
    """Whether everything that the backend `name` needs is there."""
    return is_installed(*BACKEND_PACKAGES[name].modules)


def check_backend_installed(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless the backend `name`, or `auto`, can run here."""
    if name != "auto":
        needs = BACKEND_PACKAGES[name]
        check_installed(*needs.modules, extra=needs.extra, what=f'backend="{name}"')


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
