"""The C++ example builds, and ends with the same latents as the pipeline's own call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import tgate_compile
from tests.cpp_programs import assert_checks_arguments, assert_refused, assert_same_latents, built, write_inputs
from tests.exported import COMPILED_STEPS, exported_compiled, least
from tgate_compile import BlockCache

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs g++ and cmake"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch's CMake files want the CUDA toolkit"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    return built("cpp", tmp_path_factory.mktemp("cpp"), options)


@pytest.mark.parametrize("binding_times", [False, True])
def test_the_loop_in_cpp(program: Path, binding_times: bool, tmp_path: Path) -> None:
    assert_same_latents(program, exported_compiled("aoti", binding_times=binding_times), tmp_path)


@pytest.mark.sweep
def test_forecasts_in_cpp(program: Path, tmp_path: Path) -> None:
    schedule = BlockCache(2, front=0, forecast=1)
    pipe = tgate_compile.optimize(least(), schedule, backend="eager")
    call = {"prompt": "", "num_inference_steps": COMPILED_STEPS}
    bundle = tgate_compile.export(pipe, tmp_path / "bundle", "aoti", call=call, binding_times=False)
    steps = json.loads((bundle / "manifest.json").read_text())["example"]["steps"]
    assert [step["weights"] for step in steps] == [{}, {}, {}, {"blocks": [1.5, -0.5]}]
    assert_same_latents(program, bundle, tmp_path, schedule, ["full", "blocks-skipped"] * 2)


def test_another_scheduler(program: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported_compiled("aoti"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["scheduler"]["class_name"] = "PNDMScheduler"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    inputs = write_inputs(tmp_path / "inputs")
    assert_refused(program, bundle, inputs, "a PNDMScheduler, but this program only supports DDIMScheduler")


def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert_checks_arguments(program, tmp_path)
