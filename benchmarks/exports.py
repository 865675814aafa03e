"""Compare bundles of each format with Inductor and eager execution, on the embedded pipeline, in one run.

    python benchmarks/exports.py --formats aoti --out benchmarks/results/exports_aoti.json
    python benchmarks/exports.py --formats aoti onnx --keep bundles
    python benchmarks/exports.py --formats aoti onnx --keep bundles --again --threads 1
    python benchmarks/exports.py --formats executorch onnx --without-inductor
    python benchmarks/exports.py --formats coreml --sizes-only

Exports a bundle of each format and measures the time of `export` and `load`, the number of operators, sizes on disk,
PSNR to the image of the eager graphs, resident memory of a new process before it opens the graphs, with one graph and
with both (Linux), and the time of a step of each graph. All runners take turns, so that other load on the machine
affects all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tgate_compile
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import format_called
from tgate_compile.bundle.manifest import Graph, Manifest
from tgate_compile.bundle.plan import PlannedGraph, inputs_of, planned_graphs
from tgate_compile.bundle.read_manifest import inputs_of as specs_of
from tgate_compile.bundle.read_manifest import read_manifest, shape_at
from tgate_compile.engine.backends import EagerBackend
from tgate_compile.exports.inductor.live import InductorBackend
from tgate_compile.pipeline.optimized import preview, required_state_of

STEPS, GATE = 25, 10
CALL: dict[str, Any] = {"prompt": "a large red circle", "num_inference_steps": STEPS}
CPU = torch.device("cpu")


@dataclass
class Exported:
    """The measurements of a bundle, except for the times of its steps. Only sizes if the bundle cannot run here."""

    export_s: float | None
    bytes: dict[str, int]
    operators: dict[str, int]
    load_s: float | None = None
    first_image_s: float | None = None
    image_s: float | None = None
    psnr: float | None = None
    resident_mb: dict[str, float] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=sorted(FORMATS), default=["aoti"])
    parser.add_argument("--repeat", type=int, default=30, help="number of runs of each graph with each runner")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--static", action="store_true", help="fix all sizes")
    parser.add_argument("--sizes-only", action="store_true", help="only sizes, for formats that cannot run here")
    parser.add_argument("--without-inductor", action="store_true", help="skip Inductor, which compiles for minutes")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the bundles")
    parser.add_argument("--again", action="store_true", help="measure the bundles in --keep without exporting")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "executorch" in options.formats:  # it uses all cores by default
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(options.threads)
    if options.resident is not None:
        print(json.dumps(resident(options.resident)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = options.keep or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        bundles, found, steps = {}, {}, {}
        dtype = getattr(torch, options.dtype)
        for name in options.formats:
            bundles[name] = home / name
            export_s = None if options.again else export(name, bundles[name], dtype, dynamic=not options.static)
            found[name] = Exported(export_s, sizes(bundles[name]), operators(bundles[name]))
            if not options.sizes_only:
                measure(found[name], bundles[name], options.threads, dtype)
        if not options.sizes_only:
            print("timing steps", flush=True)
            steps = step_times(bundles, options.repeat, dtype, inductor=not options.without_inductor)
    results = {
        "command": "python benchmarks/exports.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {options.threads} threads",
        "torch": torch.__version__,
        "dtype": options.dtype,
        "gate": GATE,
        "steps": STEPS,
        "formats": {name: vars(one) for name, one in found.items()},
        "step_ms": steps,
    }
    report(results)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def demo(dtype: torch.dtype) -> Any:
    pipe = tgate_compile.load_demo_pipeline(torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(name: str, folder: Path, dtype: torch.dtype, *, dynamic: bool) -> float:
    print(f"exporting {name}", flush=True)
    pipe = tgate_compile.optimize(demo(dtype), GATE, backend="eager")
    # In one piece, to compare graphs with those of `optimize`.
    options = {"dynamic": dynamic, "overwrite": True, "binding_times": False}
    return timed(lambda: tgate_compile.export(pipe, folder, name, call=CALL, **options))


def sizes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def operators(folder: Path) -> dict[str, int]:
    """Return the number of operators of each graph, from the manifest."""
    return {name: graph.facts.nodes for name, graph in read_manifest(folder).graphs.items()}


def measure(found: Exported, folder: Path, threads: int, dtype: torch.dtype) -> None:
    """Run the bundle in this process and in a separate one, and add the results to `found`."""
    pipe = demo(dtype)
    found.load_s = timed(lambda: tgate_compile.load(pipe, folder))
    found.first_image_s, found.image_s = timed(lambda: pipe(**CALL)), timed(lambda: pipe(**CALL))
    eager = tgate_compile.optimize(demo(dtype), GATE, backend="eager")
    found.psnr = psnr(image_of(pipe), image_of(eager))
    command = [sys.executable, __file__, "--resident", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found.resident_mb = json.loads(done.stdout.splitlines()[-1])


def image_of(pipe: Any) -> np.ndarray[Any, Any]:
    images = pipe(**CALL, generator=torch.Generator().manual_seed(0), output_type="np").images
    return np.asarray(images, np.float64)


def psnr(images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return -10 * math.log10(max(float(np.square(images - expected).mean()), 1e-20))


def resident(folder: Path) -> dict[str, float]:
    """Return the resident memory in MB before any graph is opened, and after each graph has run."""
    manifest = read_manifest(folder)
    functions = format_called(manifest.graph_format)
    names = list(manifest.graphs)
    found = {"before": resident_mb()}
    sessions = []
    for name in names:
        graph = manifest.graphs[name]
        sessions.append(functions.open_graph(graph, folder, CPU, {}))
        sessions[-1].run(random_inputs(graph, manifest))
        found[f"with {name}"] = resident_mb()
    return found


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1e3


def random_inputs(graph: Graph, manifest: Manifest) -> list[torch.Tensor]:
    sizes = {name: size.example for name, size in manifest.sizes.items()}
    return [torch.randn(shape_at(spec.shape, sizes)).to(getattr(torch, spec.dtype)) for spec in specs_of(graph)]


def step_times(
    bundles: Mapping[str, Path], repeat: int, dtype: torch.dtype, *, inductor: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the minimum and median time in milliseconds, for each graph and runner."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for planned in static_graphs(dtype):
        runners = runners_of(planned, bundles, inductor=inductor)
        times: dict[str, list[float]] = {name: [] for name in runners}
        with torch.no_grad():
            for run in runners.values():
                run()
            for _ in range(repeat):
                for name, run in runners.items():
                    times[name].append(timed(run) * 1e3)
        found[planned.name] = {
            name: {"min": round(min(ms), 2), "median": round(statistics.median(ms), 2)} for name, ms in times.items()
        }
    return found


def static_graphs(dtype: torch.dtype) -> list[PlannedGraph]:
    pipe = tgate_compile.optimize(demo(dtype), GATE, backend="eager")
    ((component, hook),) = required_state_of(pipe).hooks.items()
    return list(planned_graphs(hook, preview(pipe, CALL)[component], ()).values())


def runners_of(planned: PlannedGraph, bundles: Mapping[str, Path], *, inductor: bool) -> dict[str, Callable[[], Any]]:
    """Return functions that run the graph on the same inputs: with eager and Inductor, as made by `optimize` with fixed
    shapes, and from each bundle."""
    shapes = [node.meta["val"] for node in inputs_of(planned)]
    inputs = [torch.randn(fake.shape).to(fake.dtype) for fake in shapes]
    runners: dict[str, Callable[[], Any]] = {}
    compilers = {"eager": EagerBackend({}), **({"inductor": InductorBackend({})} if inductor else {})}
    for name, backend in compilers.items():
        compiled = backend.compile(planned.variant, inputs)
        runners[name] = lambda compiled=compiled: compiled(planned.weights, inputs)
    for name, folder in bundles.items():
        graph = read_manifest(folder).graphs[planned.name]
        session = format_called(name).open_graph(graph, folder, CPU, {})
        runners[name] = lambda session=session: session.run(inputs)
    return runners


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(results: Mapping[str, Any]) -> None:
    for name, one in results["formats"].items():
        print(f"{name}: export {one['export_s'] or math.nan:.1f} s")
        print("  operators:", ", ".join(f"{graph} {count}" for graph, count in one["operators"].items()))
        print("  MB:", ", ".join(f"{file} {size / 1e6:.3f}" for file, size in one["bytes"].items()))
        if one["load_s"] is None:
            continue
        print(f"  load {one['load_s']:.2f} s, images {one['first_image_s']:.2f} and {one['image_s']:.2f} s, ", end="")
        print(f"PSNR {one['psnr']:.1f} dB")
        print("  resident MB:", ", ".join(f"{when} {mb:.0f}" for when, mb in one["resident_mb"].items()))
    for graph, runners in results["step_ms"].items():
        print(f"{graph}, ms (least, median):")
        for name, ms in runners.items():
            relative = ms["median"] / runners["eager"]["median"]
            print(f"  {name:12} {ms['min']:8.1f} {ms['median']:8.1f}   {relative:.2f} of eager")


if __name__ == "__main__":
    main()
