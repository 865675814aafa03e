"""Running TensorRT engines; needs an NVIDIA GPU and NVIDIA's packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import GATE, STEPS, plain
from tests.tiny_pipelines import pixart, pixart_prompt, run
from tgate_compile import BackendError
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.tensorrt.open import check_gpu_supported


def package(name: str) -> Any:
    problem = f"{name} is not installed" if importlib.util.find_spec(name) is None else ""
    if not problem and torch.cuda.is_available():
        try:
            check_gpu_supported(name, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
        except BackendError as error:
            problem = str(error)
    return pytest.mark.skipif(bool(problem), reason=problem or "it is there")


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
FORMATS = [
    pytest.param("tensorrt-rtx", marks=package("tensorrt_rtx")),
    pytest.param("tensorrt", marks=package("tensorrt")),
]
CALL = {"prompt": "", "num_inference_steps": STEPS}
#: TensorRT adds in a different order.
CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_the_same_images(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = plain().to("cuda", dtype)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    small, large = run(pipe), run(pipe, height=24, width=32, prompt=["red", "cat"])
    options = {"profile": {"b": (1, 1, 2)}}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", format, call=CALL, format_options=options)
    for graph in read_bundle(folder).manifest.graphs.values():
        assert graph.parity is not None
        assert len(graph.parity.measured) == 2
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe), small) < CLOSE[dtype]
    assert difference(run(pipe, height=24, width=32, prompt=["red", "cat"]), large) < CLOSE[dtype]
    assert difference(run(pipe), small) < CLOSE[dtype]


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_change(format: str, tmp_path: Path) -> None:
    """Engines without weights get them from the bundle, and later from the denoiser."""
    pipe = plain().to("cuda")
    tgate_compile.optimize(pipe, GATE, backend="eager")
    before = run(pipe)
    options = {"refit": True}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", format, call=CALL, dynamic=False, format_options=options)
    manifest = read_bundle(folder).manifest
    assert manifest.weights == "graphs/weights.bin"
    assert {"graphs/full.onnx", "graphs/full.engine"} < set(manifest.files)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.01)
    changed = run(pipe)
    pipe = tgate_compile.load(plain().to("cuda"), folder)
    assert difference(run(pipe), before) < CLOSE[torch.float32]
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.01)
    assert difference(run(pipe), changed) < CLOSE[torch.float32]


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_stay(format: str, tmp_path: Path) -> None:
    pipe = plain().to("cuda")
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = run(pipe)
    options = {"strip": True}
    folder = tgate_compile.export(pipe, tmp_path / "bundle", format, call=CALL, dynamic=False, format_options=options)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder)
    assert difference(run(pipe), expected) < CLOSE[torch.float32]


@package("tensorrt_rtx")
def test_kernels_compiled_for_the_gpu_are_kept(tmp_path: Path) -> None:
    pipe = plain().to("cuda", torch.float16)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "tensorrt-rtx", call=CALL, dynamic=False)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder, backend_options={"runtime_cache": tmp_path})
    first = run(pipe)
    assert (tmp_path / "full.cache").stat().st_size > 0
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder, backend_options={"runtime_cache": tmp_path})
    assert difference(run(pipe), first) < CLOSE[torch.float16]


@package("tensorrt_rtx")
def test_a_pipeline_that_is_not_on_the_gpu(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    folder = tgate_compile.export(pipe, tmp_path / "bundle", "tensorrt-rtx", call=CALL, dynamic=False)
    with pytest.raises(BackendError, match=r'Call pipe.to\("cuda"\) first'):
        tgate_compile.load(plain(), folder)


@package("tensorrt")
def test_timings_are_kept(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain().to("cuda"), GATE, backend="eager")
    options = {"timing_cache": tmp_path / "timing.cache", "version_compatible": True, "hardware_compatible": "same"}
    folder = tgate_compile.export(
        pipe, tmp_path / "bundle", "tensorrt", call=CALL, dynamic=False, format_options=options
    )
    assert (tmp_path / "timing.cache").stat().st_size > 0
    expected = run(pipe)
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, folder, backend_options={"host_code": True})
    assert difference(run(pipe), expected) < CLOSE[torch.float32]


@package("torch_tensorrt")
@pytest.mark.parametrize(("build", "call"), [(plain, {}), (pixart, pixart_prompt())], ids=["sd", "pixart with masks"])
def test_the_backend(build: Any, call: dict[str, Any]) -> None:
    pipe = build().to("cuda")
    tgate_compile.optimize(pipe, GATE, backend="eager")
    eager = run(pipe, **call)
    tgate_compile.restore(pipe)
    tgate_compile.optimize(pipe, GATE, backend="tensorrt")
    assert difference(run(pipe, **call), eager) < CLOSE[torch.float32]
