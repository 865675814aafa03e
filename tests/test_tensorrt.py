"""`format="tensorrt"` without an installation, and its options; tests/test_tensorrt_gpu.py runs it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_compile
from tests.exported import GATE, exported, plain
from tgate_compile import ConfigurationError
from tgate_compile.exports.tensorrt.save import ENTERPRISE, EngineOptions, engine_options

without_it = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="tests the error without the package"
)


def asked(**options: Any) -> EngineOptions:
    """Return the parsed options, which needs neither TensorRT nor a GPU."""
    return engine_options("tensorrt", "tensorrt", ENTERPRISE.options, options)


@without_it
def test_the_error_names_the_extra(tmp_path: Path) -> None:
    pipe = tgate_compile.optimize(plain(), GATE, backend="eager")
    with pytest.raises(ConfigurationError) as caught:
        tgate_compile.export(pipe, tmp_path / "bundle", "tensorrt")
    for part in ('format="tensorrt" needs', "tensorrt", "pip install 'tgate_compile[tensorrt]'", "NVIDIA's own index"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@without_it
def test_the_error_on_loading_names_the_extra(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported(), tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graph_format"] = "tensorrt"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match=r'A bundle of format "tensorrt" needs .*\[tensorrt\]'):
        tgate_compile.load(plain(), folder)


def test_settings(tmp_path: Path) -> None:
    plainly = asked()
    assert (plainly.settings.flags, plainly.settings.timing_cache, plainly.keeps_onnx) == ((), None, False)
    path = tmp_path / "timing.cache"
    settings = asked(timing_cache=path, version_compatible=True, hardware_compatible="ampere+").settings
    assert (settings.flags, settings.timing_cache) == (("VERSION_COMPATIBLE",), path)
    assert settings.hardware_compatibility == "AMPERE_PLUS"
    assert asked(profile={"b": [1, 2, 3]}).profile == {"b": (1, 2, 3)}


def test_settings_of_engines_without_weights() -> None:
    for option, flags in {"strip": ("STRIP_PLAN", "REFIT_IDENTICAL"), "refit": ("STRIP_PLAN", "REFIT")}.items():
        options = asked(**{option: True})
        assert options.settings.flags == flags
        assert options.keeps_onnx


def test_the_names_that_are_used() -> None:
    """Both packages use the same names."""
    trt = pytest.importorskip("tensorrt_rtx")
    for flag in ("TF32", "STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "VERSION_COMPATIBLE"):
        assert flag in trt.BuilderFlag.__members__
    for level in ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"):
        assert level in trt.HardwareCompatibilityLevel.__members__


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"hardware_compatible": "turing"}, '"ampere+" or "same", but got'),
        ({"hardware_compatible": ["same"]}, "['same']"),
        ({"timing_cache": "no/such/folder/x"}, "in a folder that exists"),
        ({"version_compatible": 1}, "True or False"),
        ({"compute_capabilities": ["8.9"]}, "It accepts: profile, timing_cache"),
    ],
)
def test_wrong_options(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        asked(**options)
    assert part in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")
def test_it_needs_a_gpu_to_build() -> None:
    with pytest.raises(ConfigurationError, match=r'needs an NVIDIA GPU.*Use format="tensorrt-rtx"'):
        ENTERPRISE.check_options({})
