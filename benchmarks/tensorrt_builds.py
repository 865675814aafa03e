"""Measure time, size and memory of building engines with TensorRT for RTX, which does not need a GPU.

    python benchmarks/tensorrt_builds.py --out benchmarks/results/tensorrt_rtx.json

Exports bundles of the embedded pipeline with dynamic and fixed sizes, in fp32 and fp16, each in a separate process. The
peak resident memory of the process is measured before the first engine is built and at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import tgate_compile

STEPS, GATE = 25, 10
CASES = [(dtype, dynamic) for dynamic in (True, False) for dtype in ("float32", "float16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=".json file for the results")
    parser.add_argument("--case", nargs=2, metavar=("DTYPE", "DYNAMIC"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        dtype, dynamic = arguments.case
        print(json.dumps(measured(dtype, dynamic == "True")))
        return
    rows = []
    for dtype, dynamic in CASES:
        command = [sys.executable, __file__, "--case", dtype, str(dynamic)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        results = {
            "command": f"python {Path(__file__).relative_to(Path.cwd())} --out {arguments.out}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
            "versions": {name: version(name) for name in ("torch", "tensorrt-rtx", "onnx")},
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def measured(dtype: str, dynamic: bool) -> dict[str, Any]:
    """Export one bundle; return its times in seconds and sizes in megabytes."""
    pipe = tgate_compile.load_demo_pipeline(torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    stages: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as home:
        folder = tgate_compile.export(
            pipe,
            Path(home, "bundle"),
            "tensorrt-rtx",
            call={"prompt": "", "num_inference_steps": STEPS},
            dynamic=dynamic,
            progress=lambda stage: stages.append((stage, time.perf_counter(), peak_mb())),
        )
        stages.append(("end", time.perf_counter(), peak_mb()))
        sizes = {path.stem: round(path.stat().st_size / 1e6, 2) for path in sorted(folder.rglob("*.engine"))}
    builds = {
        stage.split()[-2]: round(after[1] - began, 1)
        for (stage, began, _), after in pairwise(stages)
        if stage.startswith("Building")
    }
    return {
        "dtype": dtype,
        "dynamic": dynamic,
        "weights_mb": round(sum(parameter.nbytes for parameter in pipe.unet.parameters()) / 1e6, 2),
        "build_s": builds,
        "export_s": round(stages[-1][1] - stages[0][1], 1),
        "engine_mb": sizes,
        "peak_before_builds_mb": next(round(peak) for stage, _, peak in stages if stage.startswith("Building")),
        "peak_mb": round(stages[-1][2]),
    }


def peak_mb() -> float:
    """Return the peak resident memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
