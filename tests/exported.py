"""Bundles of a tiny pipeline, exported once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tgate_compile
from tests.once import made_once
from tests.tiny_pipelines import pixart, stable_diffusion

STEPS = 6
GATE = 3
#: Steps for formats with compiled graphs: the fewest that need both graphs.
COMPILED_STEPS = 4
COMPILED_GATE = 2


def exported(*, binding_times: bool = True) -> Path:
    """Return the bundle of `plain()` with a gate at step `GATE`, split by binding time or not; do not modify it."""
    name = "onnx-bundle" if binding_times else "onnx-bundle-whole"
    return made_once(name, lambda folder: _export(folder, plain(), "onnx", GATE, STEPS, binding_times))


def exported_compiled(format: str, *, binding_times: bool = False) -> Path:
    """Return the bundle of `least()` in a format that takes most of a minute to export; do not modify it."""
    name = f"{format}-bundle" + "-split" * binding_times
    return made_once(
        name, lambda folder: _export(folder, least(), format, COMPILED_GATE, COMPILED_STEPS, binding_times)
    )


def plain() -> Any:
    """Return the pipeline that the bundles are exported from."""
    return stable_diffusion(layout="small")


def least() -> Any:
    """Return the pipeline for formats that compile: half the nodes of `plain()`, which are what takes the time."""
    return stable_diffusion(layout="least", block_out_channels=(32,))


def least_pixart() -> Any:
    """Return a transformer for formats that compile: PixArt with one block."""
    pipe = pixart()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    return pipe


def _export(folder: Path, pipe: Any, format: Any, gate: int, steps: int, binding_times: bool) -> None:
    tgate_compile.optimize(pipe, gate, backend="eager")
    call = {"prompt": "", "num_inference_steps": steps}
    tgate_compile.export(pipe, folder, format, call=call, binding_times=binding_times)
