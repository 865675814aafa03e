"""Bundles of a tiny pipeline, exported once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tgate_compile
from tests.once import made_once
from tests.tiny_pipelines import stable_diffusion

STEPS = 6
GATE = 3
#: Steps for formats with compiled graphs: the fewest that need both graphs.
COMPILED_STEPS = 4
COMPILED_GATE = 2


def exported() -> Path:
    """Return the bundle of `plain()` with a gate at step `GATE`; do not modify it."""
    return made_once("onnx-bundle", lambda folder: _export(folder, "onnx", GATE, STEPS))


def exported_compiled(format: str) -> Path:
    """Return the bundle of `plain()` in a format that takes most of a minute to export; do not modify it."""
    return made_once(f"{format}-bundle", lambda folder: _export(folder, format, COMPILED_GATE, COMPILED_STEPS))


def plain() -> Any:
    """Return the pipeline that the bundles are exported from."""
    return stable_diffusion(layout="small")


def _export(folder: Path, format: Any, gate: int, steps: int) -> None:
    pipe = tgate_compile.optimize(plain(), gate, backend="eager")
    tgate_compile.export(pipe, folder, format, call={"prompt": "", "num_inference_steps": steps})
