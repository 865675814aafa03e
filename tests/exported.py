"""A bundle of a tiny pipeline, exported once for all tests."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tgate_compile
from tests.tiny_pipelines import stable_diffusion

STEPS = 6
GATE = 3


@functools.cache
def exported() -> Path:
    """The bundle of `plain()` with a gate at step `GATE`; leave it as it is."""
    pipe = plain()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home)
    return tgate_compile.export(pipe, Path(home, "bundle"), call={"prompt": "", "num_inference_steps": STEPS})


def plain() -> Any:
    """The pipeline that it is made from."""
    return stable_diffusion(layout="small")
