"""FreeU's Fourier filter in runtimes without complex numbers, or with incorrect ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import least
from tests.tiny_pipelines import run, stable_diffusion

FACTORS = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
CALL = {"prompt": "", "num_inference_steps": 1}
CLOSE = 1e-4


def with_freeu(build: Any = least) -> Any:
    pipe = build()
    pipe.enable_freeu(**FACTORS)
    return pipe


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("backend", "dtype", "most"),
    [("openvino", torch.float32, CLOSE), ("openvino", torch.float16, 1e-2), ("onnxruntime", torch.float16, 1e-2)],
)
def test_backends(backend: str, dtype: torch.dtype, most: float) -> None:
    pytest.importorskip(backend)
    pipe = with_freeu(lambda: stable_diffusion(layout="small").to(dtype))
    expected = run(pipe, steps=1)
    tgate_compile.optimize(pipe, 1000, backend=backend)
    assert difference(run(pipe, steps=1).float(), expected.float()) < most


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("format", "options"),
    [
        pytest.param("onnx", {}),
        pytest.param("openvino", {}),
        pytest.param("executorch", {}, marks=pytest.mark.heavy),
        pytest.param("executorch", {"delegate": "portable"}, marks=pytest.mark.heavy),
        pytest.param("aoti", {}, marks=pytest.mark.heavy),
    ],
)
def test_bundles(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    if format not in ("onnx", "aoti"):
        pytest.importorskip(format)
    pipe = with_freeu()
    tgate_compile.optimize(pipe, 1000, backend="eager")
    expected = run(pipe, steps=1)
    folder = tgate_compile.export(pipe, tmp_path / "bundle", format, call=CALL, dynamic=False, format_options=options)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe, steps=1), expected) < CLOSE


@pytest.mark.heavy
def test_core_ml(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    pipe = with_freeu()
    tgate_compile.optimize(pipe, 1000, backend="eager")
    assert tgate_compile.export(pipe, tmp_path / "bundle", "coreml", call=CALL)
