"""The C++ example builds, and ends with the same latents as the pipeline's own call."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.cpp_programs import assert_checks_arguments, assert_decides, assert_same_latents, built, exported_decided
from tests.exported import exported_compiled
from tgate_compile import FirstBlockCache, TeaCache, TGate

executorch = pytest.importorskip("executorch", reason="needs ExecuTorch")

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs g++ and cmake"),
    pytest.mark.skipif(
        sys.platform != "linux" or not sysconfig.get_config_var("Py_ENABLE_SHARED"),
        reason="the wheel's library needs Python as a library",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel = Path(executorch.__path__[0])
    options = [f"-DCMAKE_PREFIX_PATH={wheel / 'share' / 'cmake'}", f"-DPython3_ROOT_DIR={sys.base_prefix}"]
    # ExecuTorch's CMake files run `python3` to find the libraries for this Python.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return built("executorch", tmp_path_factory.mktemp("executorch-cpp"), options, environment)


@pytest.mark.heavy
@pytest.mark.parametrize("binding_times", [False, True])
def test_the_loop_in_cpp(program: Path, binding_times: bool, tmp_path: Path) -> None:
    assert_same_latents(program, exported_compiled("executorch", binding_times=binding_times), tmp_path)


@pytest.mark.heavy
def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert_checks_arguments(program, tmp_path)


# Steps that are decided at run time.


@pytest.mark.heavy
def test_decided_steps_in_cpp(program: Path, tmp_path: Path) -> None:
    method = FirstBlockCache(0.175, forecast=1)
    bundle = exported_decided("executorch", method, format_options={"delegate": "portable"})
    assert_decides(program, bundle, tmp_path, method, "FKFKKFKFFK")


@pytest.mark.sweep
def test_decided_steps_after_a_gate_in_cpp(program: Path, tmp_path: Path) -> None:
    """The graphs are split by binding time, and delegated to XNNPACK."""
    schedule = FirstBlockCache(0.175, forecast=1) + TGate(5)
    bundle = exported_decided("executorch", schedule, binding_times=True)
    assert_decides(program, bundle, tmp_path, schedule, "FKFKFplppl")


@pytest.mark.sweep
def test_the_previous_step_in_cpp(program: Path, tmp_path: Path) -> None:
    """TeaCache compares with the previous step, and adds up the changes."""
    method = TeaCache(1.0, coefficients=(1, 0))
    bundle = exported_decided("executorch", method)
    assert_decides(program, bundle, tmp_path, method, "FKKFKKFKFF")
