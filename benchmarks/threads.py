"""Measure the steps of the embedded model at 1 to N threads in each runtime, and compare the default with the best.

    python benchmarks/threads.py --out benchmarks/results/threads.json

Each runtime runs the full and the pruned graph at every number of threads, in turns, so that other work on the machine
affects all of them. The default is what the library takes without an option: the physical cores that the process may
use. It should be within 5 % of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile._machine import cpu_quota, default_threads
from tgate_compile._runtimes import is_backend_installed
from tgate_compile.study.bench.measure import machine_of, timed_generation

RUNTIMES = ("openvino", "onnxruntime", "eager")
PROMPT = "a large red circle on a blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd", choices=["sd", "sdxl", "pixart", "lcm"])
    parser.add_argument("--runtimes", nargs="+", default=[name for name in RUNTIMES if is_backend_installed(name)])
    parser.add_argument("--most", type=int, default=len(os.sched_getaffinity(0)), help="the largest number of threads")
    parser.add_argument("--repeat", type=int, default=7, help="images at each number of threads")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    default = default_threads(torch.get_num_threads())
    rows = {name: measured(name, arguments, default) for name in arguments.runtimes}
    result = {
        "command": " ".join(["python", "benchmarks/threads.py", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "quota": cpu_quota(),
        "default": default,
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def measured(runtime: str, arguments: argparse.Namespace, default: int | None) -> dict[str, Any]:
    """Return the milliseconds of a step by the number of threads, and how far the default is from the best."""
    variant = demo_variant(arguments.model)
    counts = range(1, arguments.most + 1)
    call = {"prompt": PROMPT, "num_inference_steps": arguments.steps, "guidance_scale": variant.guidance}
    pipes = {}
    for count in counts:
        pipes[count] = tgate_compile.load_demo_pipeline(arguments.model)
        pipes[count].set_progress_bar_config(disable=True)
        options = {} if runtime == "eager" else {"threads": count}
        tgate_compile.optimize(pipes[count], arguments.steps // 2, backend=runtime, backend_options=options)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    before = torch.get_num_threads()
    try:
        for turn in range(arguments.repeat + 1):
            for place in range(len(counts)):
                count = counts[(turn + place) % len(counts)]
                if runtime == "eager":
                    torch.set_num_threads(count)
                timed = timed_generation(pipes[count], {**call, **variant.call}, 0)
                if turn:  # the first image captures and compiles
                    seconds[count].append(median(timed.steps[1:]))
    finally:
        torch.set_num_threads(before)
    step_ms = {count: 1e3 * median(times) for count, times in seconds.items()}
    best = min(step_ms, key=lambda count: step_ms[count])
    own = step_ms.get(before if runtime == "eager" else default or before)
    return {"step_ms": step_ms, "best": best, "default_to_best": None if own is None else own / step_ms[best]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    counts = list(next(iter(rows.values()))["step_ms"])
    lines = [
        "| | " + " | ".join(f"{count} threads / ms" for count in counts) + " | default to best |",
        "| --- |" + " ---: |" * (len(counts) + 1),
    ]
    for name, row in rows.items():
        ratio = "" if row["default_to_best"] is None else f"{row['default_to_best']:.2f}"
        lines.append(f"| {name} | " + " | ".join(f"{row['step_ms'][count]:.1f}" for count in counts) + f" | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
