"""The C++ example builds, and ends with the latents that the pipeline's own call ends with."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_GATE as GATE
from tests.exported import COMPILED_STEPS as STEPS
from tests.exported import exported_compiled, plain
from tests.tiny_pipelines import PROMPT, run

executorch = pytest.importorskip("executorch", reason="needs ExecuTorch")

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs g++ and cmake"),
    pytest.mark.skipif(
        sys.platform != "linux" or not sysconfig.get_config_var("Py_ENABLE_SHARED"),
        reason="the wheel's library needs Python as a library",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("executorch-cpp")
    wheel = Path(executorch.__path__[0])
    options = [f"-DCMAKE_PREFIX_PATH={wheel / 'share' / 'cmake'}", f"-DPython3_ROOT_DIR={sys.base_prefix}"]
    # ExecuTorch's CMake files ask `python3` which of its libraries is for this Python.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(EXAMPLES / "executorch"), "-B", str(build), *options]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "denoise"


def test_the_loop_in_cpp(program: Path, tmp_path: Path) -> None:
    bundle, inputs, out = exported_compiled("executorch"), tmp_path / "inputs", tmp_path / "out.npy"
    pipe = plain()
    runpy.run_path(str(EXAMPLES / "cpp" / "write_inputs.py"))["write_inputs"](pipe, inputs, PROMPT, STEPS)
    command = [str(program), str(bundle), str(inputs), "5", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["step 0: full", "step 1: full", "step 2: pruned", "step 3: pruned"]

    tgate_compile.optimize(pipe, GATE, backend="eager")
    latents = torch.from_numpy(np.load(inputs / "latents.npy"))
    expected = run(pipe, steps=STEPS, guidance_scale=5.0, latents=latents)
    assert difference(torch.from_numpy(np.load(out)), expected) < 1e-4


def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert subprocess.run([str(program)], capture_output=True).returncode == 2
    command = [str(program), str(tmp_path), str(tmp_path), "5", "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot read" in done.stderr
    assert "manifest.json" in done.stderr
