"""Compare graphs that are split by binding time with the same graphs unsplit, side by side in one process.

    python benchmarks/binding_times.py --out benchmarks/results/binding_times.json
    python benchmarks/binding_times.py --models sd --backends eager --times 3

For each embedded model and backend there are two pipelines, `binding_times=True` and `False`, at the same gate step.
After a first image each, which includes capture and compilation, they make images in turns. The ratios are split over
unsplit, so below 1 the split graphs are faster; `pairs` has one ratio for each pair of images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tgate_compile

PROMPT = "a large red circle"
GATE = 10


def pipeline(model: str, backend: str, *, split: bool) -> Any:
    pipe = tgate_compile.load_demo_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return tgate_compile.optimize(pipe, GATE, backend=backend, binding_times=split)


def seconds(pipe: Any, model: str, clock: Callable[[], float]) -> float:
    variant = tgate_compile.DEMO_VARIANTS[model]
    began = clock()
    pipe(
        PROMPT,
        num_inference_steps=variant.steps,
        guidance_scale=variant.guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **variant.call,
    )
    return clock() - began


def compare(model: str, backend: str, times: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the ratios of a model's images on a backend."""
    pipes = {split: pipeline(model, backend, split=split) for split in (False, True)}
    first = {split: seconds(pipe, model, clock) for split, pipe in pipes.items()}
    pairs: list[float] = []
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(times):
        order = (False, True) if number % 2 else (True, False)
        for split in order:
            taken[split].append(seconds(pipes[split], model, clock))
        pairs.append(taken[True][-1] / taken[False][-1])
    return {
        "model": model,
        "backend": backend,
        "unsplit_seconds": median(taken[False]),
        "split_seconds": median(taken[True]),
        "ratio": median(pairs),
        "pairs": [round(ratio, 4) for ratio in pairs],
        "first_seconds": [first[False], first[True]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd", "sdxl", "pixart"])
    parser.add_argument("--backends", nargs="+", default=["eager", "openvino", "onnxruntime"])
    parser.add_argument("--times", type=int, default=20, help="number of pairs of images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of one thread's CPU time, for a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = []
    for model in options.models:
        for backend in options.backends:
            rows.append(compare(model, backend, options.times, clock))
            print({name: value for name, value in rows[-1].items() if name != "pairs"}, flush=True)
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_time": options.cpu_time,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
