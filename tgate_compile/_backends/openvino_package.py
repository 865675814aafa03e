"""The package openvino, imported so that it tells nobody of it."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

#: What openvino sends an event with when it is imported, unless the user has said no beforehand. Without it, openvino
#: takes a stub of its own.
_TELEMETRY = "openvino_telemetry"


def openvino() -> ModuleType:
    """The module `openvino`, which sends nothing if it is first imported here."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    was_there, before = _TELEMETRY in sys.modules, sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # so importing it says that it is not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        if was_there and before is not None:
            sys.modules[_TELEMETRY] = before


@functools.cache
def core() -> Any:
    """The `openvino.Core` of this process: it loads its plug-ins once."""
    return openvino().Core()
