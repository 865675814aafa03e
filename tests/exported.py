"""Bundles of a tiny pipeline, exported once for all tests."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import tgate_compile
from tests.tiny_pipelines import stable_diffusion

STEPS = 6
GATE = 3
COMPILED_STEPS = 4
COMPILED_GATE = 2


@functools.cache
def exported() -> Path:
    """The bundle of `plain()` with a gate at step `GATE`; leave it as it is."""
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home)
    return tgate_compile.export(pipe, Path(home, "bundle"), call={"prompt": "", "num_inference_steps": STEPS})


def compiled(format: str, factory: pytest.TempPathFactory) -> Path:
    """The bundle of `plain()` in a format that takes most of a minute, with a gate at step `COMPILED_GATE`.

    Parallel test processes share it: leave it as it is.
    """
    base = factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = home / f"{format}-bundle"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            pipe = plain()
            tgate_compile.optimize(pipe, COMPILED_GATE, backend="eager")
            tgate_compile.export(pipe, folder, format, call={"prompt": "", "num_inference_steps": COMPILED_STEPS})
    return folder


def plain() -> Any:
    """The pipeline that it is made from."""
    return stable_diffusion(layout="small")
