"""Measure T-GATE on a CPU against plain diffusers, in float32 and in bfloat16, in one run.

    python benchmarks/cpu_goals.py --out benchmarks/results/cpu_goals.json
    python benchmarks/cpu_goals.py --model sd --repeat 9 --out benchmarks/results/cpu_goals_embedded.json
    python benchmarks/cpu_goals.py --int8 --out benchmarks/results/cpu_goals_int8.json

The contenders make whole images in turns, 25 steps with gate 10 unless stated: plain diffusers in float32 and in
bfloat16; OpenVINO's graphs ungated, gated and with DeepCache, in both precisions; and the plain pipeline with as many
steps as the gated one's operations would pay for. `efficiency` is the speedup over the same runtime's ungated graph,
divided by the ratio of the multiply-accumulates.

With `--int8` the contenders are plain diffusers in both precisions, OpenVINO's gated graphs in float32, and a bundle
for OpenVINO in calibrated int8 (`int8-static`), whose other operators compute in float32 or in bfloat16. The quality of
such a bundle is measured by `benchmarks/quantization.py`, on the embedded models: a random model has none.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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

#: Calls that are just long enough to need all graphs of a schedule.
WARM_UP = {
    "ungated": {"num_inference_steps": 2},
    "gated": {"num_inference_steps": 3, "gate_step": 1},
    "gated, DeepCache": {"num_inference_steps": 8, "gate_step": 4},
}


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
    parser.add_argument("--int8", action="store_true", help="measure a bundle in calibrated int8 instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


@dataclass(frozen=True)
class Contender:
    """A way to make the images.

    Attributes:
        make: returns a new pipeline. It is called once for each turn, so that one pipeline at a time takes memory.
        steps: the number of denoising steps of an image.
        warm_up: arguments of the call that captures and compiles, which only has to be long enough for all graphs.
    """

    make: Callable[[], Any]
    steps: int
    warm_up: dict[str, Any] = field(default_factory=dict)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Time all contenders, and report; bundles are written to `folder`."""
    is_random = arguments.model.startswith("random:")
    pipe, call = loaded(arguments.model, arguments.size)
    call = {**call, "output_type": "latent"}

    originals = {torch.float32: pipe, torch.bfloat16: copy.deepcopy(pipe).to(torch.bfloat16)}

    def copied(dtype: torch.dtype = torch.float32) -> Any:
        # A pipeline of its own with the same weights: each may be optimized differently.
        original = originals[dtype]
        made = type(pipe)(**{**original.components, "scheduler": copy.deepcopy(original.scheduler)})
        made.set_progress_bar_config(disable=True)
        return made

    def optimized(schedule: Schedule, precision: Any) -> Any:
        made = copied() if is_random else loaded(arguments.model, 0)[0]
        made.set_progress_bar_config(disable=True)
        return tgate_compile.optimize(made, schedule=schedule, backend=arguments.backend, precision=precision)

    schedules = {
        "ungated": Schedule(NEVER),
        "gated": Schedule(arguments.gate),
        "gated, DeepCache": Schedule(arguments.gate, deepcache_interval=3),
    }
    if arguments.int8:
        schedules = {"gated": schedules["gated"]}
    ratios = {
        name: macs_ratio(optimized(schedule, "float32"), {**call, "num_inference_steps": arguments.steps})
        for name, schedule in schedules.items()
        if name != "ungated"
    }
    fewer = round(arguments.steps / ratios["gated"])
    contenders = {
        f"plain {str(dtype).removeprefix('torch.')}{name}": Contender(
            partial(copied, dtype), steps, {"num_inference_steps": 2}
        )
        for name, steps in (("", arguments.steps), (f", {fewer} steps", fewer))
        for dtype in originals
    }
    for precision in ("float32",) if arguments.int8 else ("float32", "bfloat16"):
        for name, schedule in schedules.items():
            contenders[f"{arguments.backend} {precision} {name}"] = Contender(
                partial(optimized, schedule, precision),
                arguments.steps,
                WARM_UP[name],
            )
    if arguments.int8:
        write_int8(copied(), {**call, "num_inference_steps": arguments.steps}, arguments.gate, folder / "bundle")
        for precision in ("float32", "bfloat16"):
            served = partial(tgate_compile.load, folder=folder / "bundle", backend_options={"precision": precision})
            contenders[f"openvino int8-static, {precision}, gated"] = Contender(
                lambda served=served: served(copied()), arguments.steps
            )

    # Small pipelines stay in memory and take turns after each image; of large ones there is one at a time.
    kept: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeat):
        for name, contender in contenders.items():
            each = kept.get(name)
            if each is None:
                each = contender.make()
                warm_up = {"num_inference_steps": contender.steps, **contender.warm_up}
                timed_generation(each, {**_in_dtype_of(each, call), **warm_up}, 0)
            generation = timed_generation(each, {**_in_dtype_of(each, call), "num_inference_steps": contender.steps}, 0)
            seconds[name].append(generation.seconds)
            print(f"{name}: {generation.seconds:.2f} s", file=sys.stderr, flush=True)
            if not is_random:
                kept[name] = each
            elif not name.startswith("plain"):
                tgate_compile.restore(each)  # the denoiser is shared
            del each
            gc.collect()
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


def macs_ratio(optimized: Any, call: dict[str, Any]) -> float:
    """Return the multiply-accumulates of the plain pipeline's call, divided by those of the optimized one's."""
    description = tgate_compile.describe(optimized, **call)
    calls = planned_calls(optimized.scheduler, description.strip, call["num_inference_steps"])
    work = work_of(description, calls)
    tgate_compile.restore(optimized)
    return work.plain / work.gated


def write_int8(pipe: Any, call: dict[str, Any], gate: int, folder: Path) -> None:
    """Export a bundle of `pipe` for OpenVINO in calibrated int8."""
    tgate_compile.optimize(pipe, gate, backend="eager")
    tgate_compile.export(pipe, folder, "openvino", call=call, quantize={"scheme": "int8-static"})
    tgate_compile.restore(pipe)


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
                ungated = seconds.get(f"{backend} {precision} ungated")
                if name == f"{backend} {precision} {schedule}" and ungated is not None:
                    row["efficiency"] = ungated / taken / ratio
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
