"""Measure the memory that a bundle needs with the plain model, with both graphs, and with one graph at a time.

The last two are also measured with graphs that are split by binding time: a prelude and a table run before the step.

    python benchmarks/sequential_memory.py --out benchmarks/results/sequential_memory.json
    python benchmarks/sequential_memory.py --only embedded

Each figure comes from a separate process. The peak is the kernel's `VmHWM` since the start of the process, including
interpreter, libraries, weights and mapped files. The second figure is the part owned by the process, without file
pages, which the system can drop: the largest `RssAnon`, sampled every 5 ms. Linux only.

The embedded pipeline runs as a program without PyTorch, with text encoder, both graphs and decoder. The denoisers
of SD-1.5's and PixArt's size have random weights and run alone in ONNX Runtime, step by step according to the
schedule. "Plain" uses the full graph at every step, which is the cost of the ungated model on the same runtime.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STEPS = 6
GATE = 2
#: The ways in which a process runs a bundle. Split bundles have graphs that are split by binding time.
MODES = ("plain", "both", "sequential", "split, both", "split, sequential")


class Watch:
    """Sample the anonymous memory of this process until stopped, and keep the maximum."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, status("RssAnon"))

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def run_program(folder: Path, mode: str, times: int) -> list[float]:
    """Make images with the embedded pipeline; return the seconds of each."""
    from tgate_compile.runtime import BundlePipeline

    pipe = BundlePipeline(folder, threads=1, verify=False, sequential="sequential" in mode)
    gate = pipe.manifest.components.num_inference_steps if mode == "plain" else None
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        pipe("a large red circle on a blue background", seed=0, gate_step=gate)
        seconds.append(time.perf_counter() - began)
    return seconds


def run_graphs(folder: Path, mode: str, times: int) -> list[float]:
    """Run the denoiser's steps of several generations; return the seconds of each."""
    import numpy as np
    import onnxruntime

    from tgate_compile.bundle.read_manifest import early_graphs, read_manifest, shape_at
    from tgate_compile.runtime._denoiser import Graphs
    from tgate_compile.runtime._session import Settings

    manifest = read_manifest(folder, hashes=False)
    graphs = Graphs(manifest, folder, Settings(threads=1), sequential="sequential" in mode)
    sizes = {name: size.example for name, size in manifest.sizes.items()}
    rng = np.random.default_rng(0)

    def run(name: str, known: dict[str, Any], caches: dict[str, Any]) -> list[Any]:
        """Run a graph on random arguments, the values `known` and `caches`."""
        graph = manifest.graphs[name]
        inputs = {
            spec.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.asarray(rng.standard_normal(shape_at(spec.shape, sizes)), dtype=spec.dtype)
            )
            for spec in graph.inputs
        }
        inputs |= {spec.name: known[spec.name] for spec in graph.early_inputs}
        inputs |= {spec.name: caches[spec.name] for spec in graph.cache_inputs}
        kept = len(graph.outputs) + len(graph.cache_outputs) if graph.stage != "step" else len(graph.cache_outputs)
        return graphs.session(name).run(inputs, kept=kept)

    def early_values(name: str, rows: int) -> list[dict[str, Any]]:
        """Return the values of the prelude and the table of a graph for each of `rows` timesteps."""
        values: dict[str, Any] = {}
        made: list[dict[str, Any]] = [values] * rows
        for part in early_graphs(manifest.graphs, name):
            names = [spec.name for spec in manifest.graphs[part].outputs]
            if manifest.graphs[part].stage == "prelude":
                values |= {each: graphs.kept(value) for each, value in zip(names, run(part, {}, {}), strict=True)}
                continue
            outputs = [run(part, values, {}) for _ in range(rows)]
            made = [
                values | {each: graphs.kept(value) for each, value in zip(names, row, strict=True)} for row in outputs
            ]
        return made

    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        caches: dict[str, Any] = {}
        for name, steps in (("full", STEPS),) if mode == "plain" else (("full", GATE), ("pruned", STEPS - GATE)):
            for known in early_values(name, steps):
                outputs = run(name, known, caches)
                made = manifest.graphs[name]
                values = zip(made.cache_outputs, outputs[len(made.outputs) :], strict=True)
                caches |= {spec.name: graphs.kept(value) for spec, value in values}
                del outputs, values  # they keep their graph alive
        seconds.append(time.perf_counter() - began)
    return seconds


def export_embedded(folder: Path, quantize: str | None, *, split: bool) -> None:
    import tgate_compile

    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, 10, backend="eager")
    call = {"prompt": "", "num_inference_steps": 25}
    tgate_compile.export(
        pipe, folder, call=call, dynamic=False, components="all", quantize=quantize, binding_times=split
    )


def export_random(model: str, folder: Path, quantize: str | None, *, split: bool) -> None:
    """Export a denoiser with random float16 weights, optionally quantized to int8."""
    import torch

    import tgate_compile
    from tgate_compile.study.bench.methods import random_pipeline

    pipe, call = random_pipeline(model, torch.device("cpu"), torch.float16, size=256)
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    tgate_compile.export(
        pipe,
        folder,
        call={**call, "num_inference_steps": STEPS},
        dynamic=False,
        quantize=quantize,
        binding_times=split,
        progress=print,
    )


EXPORTS = {
    "embedded": export_embedded,
    "sd15": functools.partial(export_random, "sd15"),  # 1.7 GB of weights
    "pixart": functools.partial(export_random, "pixart_alpha"),  # 1.2 GB
}
#: Name, exported pipeline, quantization scheme, and number of generations per process.
CASES = (
    ("embedded, float32", "embedded", None, 3),
    ("embedded, int8", "embedded", "int8", 3),
    ("SD-1.5 size, float16", "sd15", None, 1),
    ("SD-1.5 size, int8", "sd15", "int8", 1),
    ("PixArt size, float16", "pixart", None, 1),
    ("PixArt size, int8", "pixart", "int8", 1),
)


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run this program with other arguments in a new process; return the result in its last line of output."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(task: str, what: str, folder: Path, mode: str, times: int) -> None:
    began = time.perf_counter()
    watch = Watch()
    if task == "export":
        scheme, _, split = mode.partition(" ")
        EXPORTS[what](folder, None if scheme == "float" else scheme, split=bool(split))
        print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": status("VmHWM"), "own": watch.stop()}))
        return
    before = status("VmRSS")
    seconds = run_program(folder, mode, times) if what == "embedded" else run_graphs(folder, mode, times)
    print(
        json.dumps(
            {
                "mode": mode,
                "peak_bytes": status("VmHWM"),
                "peak_own_bytes": watch.stop(),
                "resident_at_the_end_bytes": status("VmRSS"),
                "resident_before_bytes": before,
                "seconds": seconds,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(EXPORTS))
    parser.add_argument("--keep", type=Path, help="folder in which to keep the bundles; existing ones are reused")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, what, folder, mode, times = arguments.child
        child(task, what, Path(folder), mode, int(times))
        return
    home = arguments.keep or Path(tempfile.mkdtemp())
    home.mkdir(exist_ok=True)
    rows = []
    for name, what, quantize, times in CASES:
        if arguments.only not in (what, None):
            continue
        folders = {split: home / f"{what}-{quantize or 'float'}{'-split' * split}" for split in (False, True)}
        exports, sizes = {}, {}
        for split, folder in folders.items():
            if not folder.exists():
                print(f"exporting {name}{', split' * split}", file=sys.stderr, flush=True)
                scheme = (quantize or "float") + " split" * split
                exports[split] = in_a_process("--child", "export", what, str(folder), scheme, "1")
            sizes[split] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        row: dict[str, Any] = {"name": name, "bundle_bytes": sizes[False], "export": exports.get(False)}
        row |= {"split_bytes": sizes[True], "split_export": exports.get(True), "generations": times, "modes": []}
        for mode in MODES:
            print(f"{name}, {mode}", file=sys.stderr, flush=True)
            folder = folders[mode.startswith("split")]
            row["modes"].append(in_a_process("--child", "run", what, str(folder), mode, str(times)))
        rows.append(row)
    if arguments.keep is None:
        shutil.rmtree(home)
    import torch

    from tgate_compile.study.bench.measure import machine_of

    torch.set_num_threads(1)
    result = {
        "command": " ".join(["python", "benchmarks/sequential_memory.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine_of(torch.device("cpu")),
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | bundle / MB | | peak / MB | owned / MB | last generation / s |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        for at, mode in enumerate(row["modes"]):
            name, size = (row["name"], f"{row['bundle_bytes'] / 1e6:.1f}") if at == 0 else ("", "")
            peak, own = (f"{mode[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_own_bytes"))
            lines.append(f"| {name} | {size} | {mode['mode']} | {peak} | {own} | {mode['seconds'][-1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
