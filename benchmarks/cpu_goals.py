"""Measure T-GATE on a CPU against plain diffusers, in float32 and in bfloat16, in one run.

    python benchmarks/cpu_goals.py --out benchmarks/results/cpu_goals.json
    python benchmarks/cpu_goals.py --model sd --repeat 9 --out benchmarks/results/cpu_goals_embedded.json

The contenders make whole images in turns, 25 steps with gate 10 unless stated: plain diffusers in float32 and in
bfloat16; OpenVINO's graphs ungated, gated and with DeepCache, in both precisions; and the plain pipeline with as many
steps as the gated one's operations would pay for. `efficiency` is the speedup over the same runtime's ungated graph,
divided by the ratio of the multiply-accumulates.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tgate_compile
from tgate_compile import Schedule
from tgate_compile._cli.console import planned_calls, work_of
from tgate_compile.study.bench.measure import machine_of, timed_generation
from tgate_compile.study.bench.methods import random_pipeline

NEVER = 10**6


def loaded(model: str, size: int) -> tuple[Any, dict[str, Any]]:
    """Return a new pipeline and its call."""
    if model.startswith("random:"):
        return random_pipeline(model.removeprefix("random:"), torch.device("cpu"), torch.float32, size=size)
    variant = tgate_compile.DEMO_VARIANTS[model]
    call = {"prompt": "a large red circle", "guidance_scale": variant.guidance, **variant.call}
    return tgate_compile.load_demo_pipeline(model), call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="random:sd15", help="random:sd15, random:sdxl, ..., or an embedded model: sd"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels of a random model's image")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--gate", type=int, default=10)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--repeat", type=int, default=1, help="images of each contender")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pipe, call = loaded(arguments.model, arguments.size)
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "latent"}

    def copied(dtype: torch.dtype = torch.float32) -> Any:
        # A separate pipeline with the same weights: each may be optimized differently.
        made = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        if dtype is not torch.float32:
            made = copy.deepcopy(made).to(dtype)
        made.set_progress_bar_config(disable=True)
        return made

    schedules = {
        "ungated": Schedule(NEVER),
        "gated": Schedule(arguments.gate),
        "gated, DeepCache": Schedule(arguments.gate, deepcache_interval=3),
    }
    contenders: dict[str, tuple[Any, int]] = {
        "plain float32": (copied(), arguments.steps),
        "plain bfloat16": (copied(torch.bfloat16), arguments.steps),
    }
    ratios = {}
    for precision in ("float32", "bfloat16"):
        for name, schedule in schedules.items():
            optimized = tgate_compile.optimize(
                copied() if arguments.model.startswith("random:") else _silent(loaded(arguments.model, 0)[0]),
                schedule=schedule,
                backend=arguments.backend,
                precision=precision,
            )
            contenders[f"{arguments.backend} {precision} {name}"] = optimized, arguments.steps
            if precision == "float32" and name != "ungated":
                description = tgate_compile.describe(optimized, **call, num_inference_steps=arguments.steps)
                calls = planned_calls(optimized.scheduler, description.strip, arguments.steps)
                work = work_of(description, calls)
                ratios[name] = work.plain / work.gated
    fewer = round(arguments.steps / ratios["gated"])
    contenders[f"plain float32, {fewer} steps"] = contenders["plain float32"][0], fewer
    contenders[f"plain bfloat16, {fewer} steps"] = contenders["plain bfloat16"][0], fewer

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(arguments.repeat + 1):
        for name, (each, steps) in contenders.items():
            # The first turn captures and compiles, with a call that is only long enough for both graphs.
            given = {"gate_step": 1} if not turn and "gated" in name.split() else {}
            count = 4 if not turn else steps
            generation = timed_generation(each, {**_in_dtype_of(each, call), "num_inference_steps": count, **given}, 0)
            if turn:
                seconds[name].append(generation.seconds)
                print(f"{name}: {generation.seconds:.2f} s", file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/cpu_goals.py", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "model": arguments.model,
        "macs_ratios": ratios,
        "seconds": {name: median(each) for name, each in seconds.items()},
        "rows": _rows({name: median(each) for name, each in seconds.items()}, ratios, arguments.backend),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))


def _silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _in_dtype_of(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    dtype = (getattr(pipe, "unet", None) or pipe.transformer).dtype
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in call.items()
    }


def _rows(seconds: dict[str, float], ratios: dict[str, float], backend: str) -> list[dict[str, Any]]:
    rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {
            "name": name,
            "seconds": taken,
            "to_plain_float32": seconds["plain float32"] / taken,
            "to_plain_bfloat16": seconds["plain bfloat16"] / taken,
        }
        for precision in ("float32", "bfloat16"):
            for schedule, ratio in ratios.items():
                if name == f"{backend} {precision} {schedule}":
                    row["efficiency"] = seconds[f"{backend} {precision} ungated"] / taken / ratio
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
