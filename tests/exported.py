"""Bundles of a tiny pipeline, exported once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tgate_compile
from tests.once import made_once
from tests.tiny_pipelines import stable_diffusion

STEPS = 6
GATE = 3
#: Of the formats whose graphs are compiled: the fewest that have both graphs.
COMPILED_STEPS = 4
COMPILED_GATE = 2


def exported() -> Path:
    """The bundle of `plain()` with a gate at step `GATE`; leave it as it is."""
    return made_once("onnx-bundle", lambda folder: _export(folder, "onnx", GATE, STEPS))


def exported_compiled(format: str) -> Path:
    """The bundle of `plain()` in a format that takes most of a minute; leave it as it is."""
    return made_once(f"{format}-bundle", lambda folder: _export(folder, format, COMPILED_GATE, COMPILED_STEPS))


def plain() -> Any:
    """The pipeline that they are made from."""
    return stable_diffusion(layout="small")


def _export(folder: Path, format: Any, gate: int, steps: int) -> None:
    pipe = tgate_compile.optimize(plain(), gate, backend="eager")
    tgate_compile.export(pipe, folder, format, call={"prompt": "", "num_inference_steps": steps})
