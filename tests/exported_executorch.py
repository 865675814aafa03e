"""A bundle of format "executorch", converted once for all tests: it takes most of a minute."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

import tgate_compile
from tests.exported import plain

STEPS = 4
GATE = 2


def exported_executorch(factory: pytest.TempPathFactory) -> Path:
    """The bundle of `plain()` with a gate at step `GATE`; leave it as it is. Parallel test processes share it."""
    base = factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = home / "executorch-bundle"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            pipe = plain()
            tgate_compile.optimize(pipe, GATE, backend="eager")
            tgate_compile.export(pipe, folder, "executorch", call={"prompt": "", "num_inference_steps": STEPS})
    return folder
