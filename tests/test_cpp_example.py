"""The C++ example builds, and ends with the same latents as the pipeline's own call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cpp_programs import assert_checks_arguments, assert_refused, assert_same_latents, built, write_inputs
from tests.exported import exported_compiled

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


def test_another_scheduler(program: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported_compiled("aoti"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["scheduler"]["class_name"] = "PNDMScheduler"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    inputs = write_inputs(tmp_path / "inputs")
    assert_refused(program, bundle, inputs, "a PNDMScheduler, but this program only supports DDIMScheduler")


def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert_checks_arguments(program, tmp_path)
