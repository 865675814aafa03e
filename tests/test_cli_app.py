"""The command line as a whole: help, version, errors without tracebacks, and a real process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tgate_compile
from tgate_compile import _cli as entry
from tgate_compile._cli import loading
from tgate_compile._cli.app import app
from tgate_compile._errors import UnsupportedModelError

run = CliRunner().invoke


def test_version() -> None:
    result = run(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"tgate-compile {tgate_compile.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["generate", "-h"], ["describe", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = run(app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("arguments", [["paint"], ["demo", "--fast"], ["generate", "--out", "fox.png"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UnsupportedModelError("It cannot be gated: take [another] one."), "It cannot be gated: take [another] one."),
        (KeyError("lost"), "KeyError: 'lost'"),
        (RuntimeError("\n  first line\nsecond line"), "RuntimeError:   first line"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_errors_are_short_and_debug_lets_them_pass(
    error: Exception, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "load", fail)
    arguments = ["generate", "-p", "a fox", "-o", str(tmp_path / "fox.png")]
    result = run(app, arguments)
    assert result.exit_code == 1
    assert not result.stdout
    assert shown in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert run(app, ["--debug", *arguments]).exception is error


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def find(name: str) -> object:
        return None if name in ("typer", "rich") else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == entry.MSG_MISSING.format(missing="typer, rich")


WITHOUT = """
import sys
for name in ("typer", "rich", "transformers", "accelerate", "peft"):
    sys.modules[name] = None
import tgate_compile
from tgate_compile._cli import main
main()
"""


def test_the_library_needs_none_of_the_command_lines_packages() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == entry.MSG_MISSING.format(missing="typer, rich, transformers")


@pytest.mark.heavy
def test_a_real_process_prints_json_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "star.png"
    arguments = ["generate", "--prompt", "a large red star on a white background", "--out", str(out)]
    arguments += ["--steps", "3", "--gate-step", "1", "--seed", "5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tgate_compile", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    # No output of dependencies, some of which warn while they are imported.
    chosen = "Chosen for embedded: device cpu, dtype fp32, scheduler DPMSolverMultistepScheduler, guidance 5"
    assert done.stderr.strip() == chosen
    data = json.loads(done.stdout)
    assert (data["strip"], data["gate_step"], data["seeds"], data["images"]) == ("Fpp", 1, [5], [str(out)])
    assert out.is_file()
