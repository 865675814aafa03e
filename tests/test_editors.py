"""Editors and type checkers see the library's types in a user's program after README's editable installation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_packaging import ROOT, build, environment_with, only

#: A program outside the tree, with the expected type of each of its values.
PROGRAM = """
from pathlib import Path

from diffusers import StableDiffusionPipeline

import tgate_compile
import tgate_compile.passes
from tgate_compile import Schedule, TGateError

pipe = tgate_compile.load_demo_pipeline("sd")
reveal_type(tgate_compile.optimize(pipe, gate_step=10, backend="eager"))  # StableDiffusionPipeline
reveal_type(tgate_compile.describe(pipe))  # Description
reveal_type(tgate_compile.describe(pipe).last_steps)  # tuple[tuple[int, str], ...]
reveal_type(tgate_compile.export(pipe, Path("bundle"), format="onnx"))  # Path
reveal_type(tgate_compile.tune(pipe, ["a red circle"], backend="eager"))  # Tuning
reveal_type(tgate_compile.tune(pipe, ["a red circle"]).schedule)  # Schedule
reveal_type(tgate_compile.analyze(pipe, ["a red circle"]))  # Analysis
reveal_type(tgate_compile.evaluate(pipe, [Schedule(10)], ["a red circle"], "folder"))  # Evaluation
reveal_type(tgate_compile.restore(pipe))  # StableDiffusionPipeline
reveal_type(tgate_compile.passes.__name__)  # str


def load(own: StableDiffusionPipeline) -> None:
    try:
        reveal_type(tgate_compile.load(own, "bundle", backend="openvino"))  # StableDiffusionPipeline
    except TGateError as error:
        reveal_type(error)  # TGateError
    with tgate_compile.generation(own, guidance=True) as loop:
        reveal_type(loop)  # OwnLoop
"""

#: Lines that the type checker must reject.
WRONG = """
import tgate_compile

pipe = tgate_compile.load_demo_pipeline("sd")
tgate_compile.optimize(pipe, backend="onnx")
tgate_compile.export(pipe, "bundle", format="onnxruntime")
tgate_compile.load(pipe, "bundle", backend="inductor")
tgate_compile.optimize(pipe, gate_stp=10)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the editable installation."""
    folder = tmp_path_factory.mktemp("editable")
    build("editable", folder)
    return environment_with(only(folder, "*.whl"), folder / "venv")


def expected_types() -> list[str]:
    return [line.rpartition("  # ")[2] for line in PROGRAM.splitlines() if "reveal_type" in line]


@pytest.fixture(scope="module")
def found(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what pyright reports of each program. One run does for both, as most of its time goes into PyTorch."""
    folder = tmp_path_factory.mktemp("programs")
    programs = {"right.py": PROGRAM, "wrong.py": WRONG}
    for name, program in programs.items():
        (folder / name).write_text(program)
    command = ["basedpyright", "--outputjson", "--pythonpath", str(python), *programs]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.stdout, ran.stderr
    reported = json.loads(ran.stdout)["generalDiagnostics"]
    return {name: [each for each in reported if Path(each["file"]).name == name] for name in programs}


def test_an_editor_knows_the_types(found: dict[str, list[dict[str, Any]]]) -> None:
    right = found["right.py"]
    assert [each["message"] for each in right if each["severity"] == "error"] == []
    types = [each["message"] for each in right if each["severity"] == "information"]
    assert [text.rpartition(' is "')[2].rstrip('"') for text in types] == expected_types()


def test_an_editor_marks_wrong_choices(found: dict[str, list[dict[str, Any]]]) -> None:
    errors = [each for each in found["wrong.py"] if each["severity"] == "error"]
    lines = {each["range"]["start"]["line"] + 1 for each in errors}
    assert lines == {number for number, line in enumerate(WRONG.splitlines(), 1) if "(pipe, " in line}


@pytest.mark.heavy  # mypy analyses all of PyTorch
def test_mypy_knows_the_types(python: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    # The cache of the repository's own check has most of what mypy knows of PyTorch.
    command = ["mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), "--python-executable", str(python)]
    ran = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Success: no issues found" in ran.stdout, ran.stdout + ran.stderr
    types = [line.rpartition('type is "')[2].rstrip('"') for line in ran.stdout.splitlines() if "Revealed" in line]
    assert [name.rpartition(".")[2] for name in types if "[" not in name] == [
        t for t in expected_types() if "[" not in t
    ]
