"""Whether the packages of an extra are there."""

from __future__ import annotations

import importlib.util

from tgate_compile._errors import ConfigurationError

MSG_MISSING = (
    "{what} needs packages that are not installed: {missing}. Run: pip install 'tgate_compile[{extra}]'{hint}."
)

#: What else to say.
HINTS = {
    "onnx": " (or 'tgate_compile[onnx-gpu]' on a machine with an NVIDIA GPU)",
    "tensorrt": ", which fetches NVIDIA's packages from NVIDIA's own index",
}


def is_installed(*modules: str) -> bool:
    """Whether all of these modules are there."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def check_installed(*modules: str, extra: str = "onnx", what: str = "ONNX") -> None:
    """Raise ConfigurationError, which says what to install, unless all of these modules are there."""
    missing = ", ".join(name for name in modules if not is_installed(name))
    if missing:
        raise ConfigurationError(MSG_MISSING.format(what=what, missing=missing, extra=extra, hint=HINTS.get(extra, "")))
