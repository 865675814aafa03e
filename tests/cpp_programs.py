"""Build the C++ examples, and check what each does with a bundle."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_GATE, COMPILED_STEPS, least
from tests.once import made_once
from tests.tiny_pipelines import PROMPT, VELOCITY, pixart, pixart_prompt, run
from tgate_compile import Method, Schedule
from tgate_compile.methods.schedule import schedule_of

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The graphs of the bundles of `exported.compiled`, step by step.
GATED = ("full", "full", "pruned", "pruned")

#: A call of `decided_pipe` without a `prompt` and a guidance scale, and its number of steps.
DECIDED_CALL = {name: value for name, value in pixart_prompt().items() if name != "prompt"}
DECIDED_STEPS = 10


def built(example: str, build: Path, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Path:
    """Build the program of a folder of `EXAMPLES` in `build`, with CMake `options`, and return its path."""
    configure = ["cmake", "-S", str(EXAMPLES / example), "-B", str(build), *options]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "denoise"


def write_inputs(folder: Path) -> Path:
    """Return a program's inputs for the bundles of `exported.compiled`."""
    _write_inputs(least(), folder, PROMPT, COMPILED_STEPS)
    return folder


def _write_inputs(pipe: Any, folder: Path, prompt: str | None, steps: int, **call: Any) -> None:
    runpy.run_path(str(EXAMPLES / "cpp" / "write_inputs.py"))["write_inputs"](pipe, folder, prompt, steps, **call)


def _printed(program: Path, bundle: Path, inputs: Path, out: Path) -> list[str]:
    """Run a program with guidance scale 5, and return the lines that it prints."""
    command = [str(program), str(bundle), str(inputs), "5", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def assert_same_latents(
    program: Path, bundle: Path, folder: Path, schedule: Any = COMPILED_GATE, graphs: Sequence[str] = GATED
) -> None:
    """Check that the program runs these graphs, and ends with the same latents as the pipeline's own call."""
    inputs, out = write_inputs(folder / "inputs"), folder / "out.npy"
    assert _printed(program, bundle, inputs, out) == [f"step {number}: {graph}" for number, graph in enumerate(graphs)]

    pipe = tgate_compile.optimize(least(), schedule, backend="eager")
    latents = torch.from_numpy(np.load(inputs / "latents.npy"))
    expected = run(pipe, steps=COMPILED_STEPS, guidance_scale=5.0, latents=latents)
    assert difference(torch.from_numpy(np.load(out)), expected) < 1e-4


def decided_pipe() -> Any:
    """Return a pipeline for methods that decide at run time, with the scheduler of the programs."""
    pipe = pixart()
    pipe.scheduler = DDIMScheduler(**VELOCITY, clip_sample=False)
    return pipe


def write_decided_inputs(folder: Path, scale: float = 5.0) -> Path:
    """Return a program's inputs for the bundles of `exported_decided` with this guidance scale."""
    _write_inputs(decided_pipe(), folder, None, DECIDED_STEPS, **DECIDED_CALL, guidance_scale=scale)
    return folder


def exported_decided(format: str, schedule: Method | Schedule, scale: float = 5.0, **options: Any) -> Path:
    """Return a bundle of `decided_pipe()`, exported once for all tests; do not modify it."""

    def write(folder: Path) -> None:
        pipe = tgate_compile.optimize(decided_pipe(), schedule, backend="eager")
        call = {**DECIDED_CALL, "guidance_scale": scale, "num_inference_steps": DECIDED_STEPS, "output_type": "latent"}
        tgate_compile.export(pipe, folder, format, call=call, dynamic=False, **options)  # type: ignore[arg-type]

    return made_once(f"{format}-{schedule}-{scale}-{options}", write)


def with_rule_of(schedule: Method | Schedule, bundle: Path, folder: Path) -> Path:
    """Return a copy of `bundle` that decides by the rule of another schedule with the same graphs and steps."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["method"]["rule"] = asdict(schedule_of(schedule).rule)  # type: ignore[arg-type]
    manifest["method"]["forecasts"] = dict(schedule_of(schedule).forecasts)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def assert_decides(
    program: Path,
    bundle: Path,
    folder: Path,
    schedule: Method | Schedule,
    strip: str,
    *,
    scale: float = 5.0,
    loads: bool = True,
) -> None:
    """Check that the program decides as the pipeline does, whose strip is `strip`, and ends with the same latents.

    With `loads`, check this also of `load`.
    """
    inputs, out = write_decided_inputs(folder / "inputs", scale), folder / "out.npy"
    printed = _printed(program, bundle, inputs, out)

    latents = torch.from_numpy(np.load(inputs / "latents.npy"))
    call = {**DECIDED_CALL, "guidance_scale": scale, "steps": DECIDED_STEPS, "latents": latents}
    pipe = tgate_compile.optimize(decided_pipe(), schedule, backend="eager")
    expected = run(pipe, None, **call)
    assert tgate_compile.describe(pipe).strip == strip
    planned = schedule_of(schedule).strip(DECIDED_STEPS, guided=scale > 1.0)
    assert printed == [
        f"step {number}: {_graphs(*letters)}" for number, letters in enumerate(zip(planned, strip, strict=True))
    ]
    assert difference(torch.from_numpy(np.load(out)), expected) < 1e-4
    if loads:
        loaded = tgate_compile.load(decided_pipe(), bundle)
        assert difference(run(loaded, None, **call), expected) < 1e-4
        assert tgate_compile.describe(loaded).strip == strip


def _graphs(planned: str, letter: str) -> str:
    """Return what a program prints of a step with the letter `planned` beforehand and `letter` in the end."""
    # Graphs that reuse cross-attention are without guidance, and others with it, unless the name says otherwise.
    unguided = "-unguided" if planned in "fb" else ""
    if planned.upper() not in "BC":
        return {"F": "full", "P": "pruned"}[letter.upper()] + unguided
    rest = "finish" if letter.upper() in "KL" else "tail"
    first, second = (f"{'pruned-' if planned == 'c' else ''}{part}{unguided}" for part in ("head", rest))
    return f"{first}, then {second}"


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
