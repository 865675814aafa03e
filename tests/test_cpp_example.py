"""The C++ example builds, and ends with the latents that the pipeline's own call ends with."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_STEPS as STEPS
from tests.exported import exported_compiled, plain
from tests.tiny_pipelines import PROMPT, run

EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs g++ and cmake"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch's CMake files want the CUDA toolkit"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", str(EXAMPLE), "-B", str(build), f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "denoise"


def test_the_loop_in_cpp(program: Path, tmp_path: Path) -> None:
    bundle, inputs, out = exported_compiled("aoti"), tmp_path / "inputs", tmp_path / "out.npy"
    pipe = plain()
    runpy.run_path(str(EXAMPLE / "write_inputs.py"))["write_inputs"](pipe, inputs, PROMPT, STEPS)
    command = [str(program), str(bundle), str(inputs), "5", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["step 0: full", "step 1: full", "step 2: pruned", "step 3: pruned"]

    tgate_compile.optimize(pipe, 2, backend="eager")
    latents = torch.from_numpy(np.load(inputs / "latents.npy"))
    expected = run(pipe, steps=STEPS, guidance_scale=5.0, latents=latents)
    assert difference(torch.from_numpy(np.load(out)), expected) < 1e-4


def test_another_scheduler(program: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported_compiled("aoti"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["scheduler"]["class_name"] = "PNDMScheduler"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    inputs = tmp_path / "inputs"
    runpy.run_path(str(EXAMPLE / "write_inputs.py"))["write_inputs"](plain(), inputs, PROMPT, STEPS)
    command = [str(program), str(bundle), str(inputs), "5", str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "a PNDMScheduler, and this program has DDIMScheduler alone" in done.stderr


def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert subprocess.run([str(program)], capture_output=True).returncode == 2
    command = [str(program), str(tmp_path), str(tmp_path), "5", "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot read" in done.stderr
    assert "manifest.json" in done.stderr
