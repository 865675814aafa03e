"""What TensorRT says, in Python's log."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)

_PROBLEMS = ("INTERNAL_ERROR", "ERROR")


@functools.cache
def tensorrt_log(package: str) -> Any:
    """The one `trt.ILogger` for all objects of the package: it must live longer than any of them.

    Its `last_problem` is what went wrong last, in one line.
    """
    trt = importlib.import_module(package)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind needs this very call
            self.last_problem = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _PROBLEMS:
                self.last_problem = " ".join(message.split())[:500].rstrip(". ")
            # Problems are raised as errors; its warnings are mostly about its own choices.
            logger.log(logging.INFO if severity.name in (*_PROBLEMS, "WARNING") else logging.DEBUG, "%s", message)

    return Log()
