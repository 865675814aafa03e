"""Build the C++ examples, and check what each does with a bundle."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_GATE, COMPILED_STEPS, least
from tests.tiny_pipelines import PROMPT, run

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The graphs of the bundles of `exported.compiled`, step by step.
GATED = ("full", "full", "pruned", "pruned")


def built(example: str, build: Path, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Path:
    """Build the program of a folder of `EXAMPLES` in `build`, with CMake `options`, and return its path."""
    configure = ["cmake", "-S", str(EXAMPLES / example), "-B", str(build), *options]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "denoise"


def write_inputs(folder: Path) -> Path:
    """Return a program's inputs for the bundles of `exported.compiled`."""
    runpy.run_path(str(EXAMPLES / "cpp" / "write_inputs.py"))["write_inputs"](least(), folder, PROMPT, COMPILED_STEPS)
    return folder


def assert_same_latents(
    program: Path, bundle: Path, folder: Path, schedule: Any = COMPILED_GATE, graphs: Sequence[str] = GATED
) -> None:
    """Check that the program runs these graphs, and ends with the same latents as the pipeline's own call."""
    inputs, out = write_inputs(folder / "inputs"), folder / "out.npy"
    command = [str(program), str(bundle), str(inputs), "5", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"step {number}: {graph}" for number, graph in enumerate(graphs)]

    pipe = tgate_compile.optimize(least(), schedule, backend="eager")
    latents = torch.from_numpy(np.load(inputs / "latents.npy"))
    expected = run(pipe, steps=COMPILED_STEPS, guidance_scale=5.0, latents=latents)
    assert difference(torch.from_numpy(np.load(out)), expected) < 1e-4


def assert_refused(program: Path, bundle: Path, inputs: Path, *parts: str) -> None:
    """Check that the program fails and reports why."""
    command = [str(program), str(bundle), str(inputs), "5", str(inputs / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr


def assert_checks_arguments(program: Path, folder: Path) -> None:
    """Check that the program explains its arguments, and names the files missing from the empty `folder`."""
    assert subprocess.run([str(program)], capture_output=True).returncode == 2
    assert_refused(program, folder, folder, "cannot read", "manifest.json")
