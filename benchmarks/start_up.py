"""Measure what capturing and compiling add to a process's first image: of one graph, of both, and from the disk cache.

    python benchmarks/start_up.py --out benchmarks/results/start_up.json
    python benchmarks/start_up.py --model random:sd15 --backends eager openvino --size 256

Each figure comes from a separate process, which makes two images of a few steps: the start-up is the time from
`optimize` to the end of the first image, less that of the second one. The processes are

- `one`: a gate step that is never reached, so that there is only the full graph;
- `both`: a gate in the middle, so that there are the full and the pruned graph;
- `again`: the same as `both`, with what `both` has left on disk.

`one` and `both` begin with empty caches, that of Inductor included. `stages` are the seconds of the stages that log
their time. A first process, which is not reported, reads the packages' files and makes the machine give out memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tgate_compile._cache import FOLDER_VARIABLE
from tgate_compile._runtimes import is_backend_installed

BACKENDS = ("eager", "openvino", "onnxruntime", "inductor")
KINDS = ("one", "both", "again")
#: The stage and its duration in a log message: "converted the full graph to ONNX: ..., in 5.4 s".
_STAGE = re.compile(
    r"^(captured|converted|compiled|opened|.* was captured by an earlier process).* (?:in|from disk in) ([\d.]+) s$"
)
GATE = 2


class _Stages(logging.Handler):
    """Collects the times that log messages tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        match = _STAGE.match(record.getMessage())
        if match is not None:
            what = "read" if "earlier" in match[1] else match[1]
            self.seconds.append((what, float(match[2])))


def measure(model: str, backend: str, size: int | None, steps: int, *, gated: bool) -> dict[str, Any]:
    """Return the start-up of this process, in seconds, and its stages."""
    import torch

    import tgate_compile
    from tgate_compile.study.bench.methods import random_pipeline

    stages = _Stages()
    logging.getLogger("tgate_compile").addHandler(stages)
    logging.getLogger("tgate_compile").setLevel(logging.INFO)
    call: dict[str, Any]
    if model.startswith("random:"):
        pipe, call = random_pipeline(model.removeprefix("random:"), torch.device("cpu"), torch.float32, size=size)
    else:
        variant = tgate_compile.DEMO_VARIANTS[model]
        pipe = tgate_compile.load_demo_pipeline(model)
        call = {
            "prompt": "a large red circle",
            "guidance_scale": variant.guidance,
            "output_type": "latent",
            **variant.call,
        }
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    began = time.perf_counter()
    tgate_compile.optimize(pipe, GATE if gated else steps, backend=backend)
    for _ in range(2):
        pipe(**{**call, "num_inference_steps": steps})
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    totals: dict[str, float] = {}
    for what, taken in stages.seconds:
        totals[what] = round(totals.get(what, 0.0) + taken, 1)
    return {"start_up": seconds[0] - seconds[1], "image": seconds[1], "stages": totals}


def in_process(arguments: argparse.Namespace, backend: str, kind: str, folder: Path) -> dict[str, Any]:
    """Return the result of `measure` in a new process, whose caches are in `folder`."""
    caches = {FOLDER_VARIABLE: str(folder / "graphs"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [
        sys.executable, __file__, "--worker", kind, "--backends", backend, "--model", arguments.model,
        "--steps", str(arguments.steps), *(["--size", str(arguments.size)] if arguments.size else []),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{backend}, {kind}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compared(arguments: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Return the start-up of a backend in all kinds of processes, and the ratios."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as both:
            for kind, folder in (("one", one), ("both", both), ("again", both)):
                found[kind].append(in_process(arguments, backend, kind, Path(folder)))
                print(backend, kind, found[kind][-1], file=sys.stderr, flush=True)
    # The best of several: other work on the machine only adds to a time.
    best = {kind: min(each, key=lambda result: float(result["start_up"])) for kind, each in found.items()}
    start_up = {kind: float(each["start_up"]) for kind, each in best.items()}
    ratios = {"both_to_one": start_up["both"] / start_up["one"], "again_to_both": start_up["again"] / start_up["both"]}
    return {**best, **{name: round(ratio, 3) for name, ratio in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="random:sd15", help="random:sd15, random:sdxl, ..., or an embedded model: sd"
    )
    parser.add_argument("--backends", nargs="+", default=[name for name in BACKENDS if is_backend_installed(name)])
    parser.add_argument("--size", type=int, default=256, help="pixels of a random model's image")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        (backend,) = arguments.backends
        gated = arguments.worker != "one"
        print(json.dumps(measure(arguments.model, backend, arguments.size, arguments.steps, gated=gated)))
        return
    import torch

    from tgate_compile.study.bench.measure import machine_of

    with tempfile.TemporaryDirectory() as folder:
        in_process(arguments, arguments.backends[0], "one", Path(folder))
    rows = {backend: compared(arguments, backend) for backend in arguments.backends}
    result = {
        "command": " ".join(["python", "benchmarks/start_up.py", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "model": arguments.model,
        "size": arguments.size,
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'':12}{'one graph':>12}{'both':>9}{'ratio':>7}{'from disk':>11}{'ratio':>7}   seconds")
    for backend, row in rows.items():
        one, both, again = (row[kind]["start_up"] for kind in KINDS)
        print(f"{backend:12}{one:12.1f}{both:9.1f}{row['both_to_one']:7.2f}{again:11.1f}{row['again_to_both']:7.2f}")


if __name__ == "__main__":
    main()
