"""Run the steps before the gate in one process and those after it in another: the prototype, and a model on paper.

    python benchmarks/phases_apart.py                                   # the embedded model, in two processes
    python benchmarks/phases_apart.py --bundle my-bundle --images 16
    python benchmarks/phases_apart.py --paper --out docs/results/phases_apart.json

The planner has the text encoders and the graphs under guidance. At the gate it hands latents, caches, the scheduler and
the few further inputs to the finisher, which has the other graphs and the VAE's decoder. Both are processes of the
runtime without PyTorch; the images are compared with those of one process with everything.

`--paper` counts, with the code behind `tgate-compile report`, what would be handed over and held for models of real
size, and how many images per second a number of replicas makes. Steps are taken to last as long as their MACs say.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgate_compile.bundle.manifest import PlannedPhase
from tgate_compile.bundle.read_manifest import early_graphs
from tgate_compile.methods.method import Kind
from tgate_compile.runtime import BundlePipeline
from tgate_compile.runtime._denoiser import Conditions, Denoiser
from tgate_compile.runtime._noise import Array
from tgate_compile.runtime._pipeline import Scheduler

if TYPE_CHECKING:
    from onnxruntime import OrtValue

#: The models of the table on paper, each with the gate steps.
PAPER: Mapping[str, Sequence[int]] = {"sdxl": (5, 10, 15), "sd35_medium": (8, 16, 24)}
#: Numbers of replicas.
REPLICAS = (2, 3, 4, 8, 16)
#: Bytes per element of latents, caches and weights.
HALF = 2
#: Bytes per second of a network with 10 and with 100 Gbit/s.
NETWORKS = {"10": 1.25e9, "100": 12.5e9}


@dataclass(frozen=True)
class Handover:
    """What the finisher needs for the steps from the gate on.

    Attributes:
        plan: the phase of each step.
        call: the number of the first call that is left, from 0.
        latents: the latents, [images, channels, h, w].
        scheduler: the scheduler, with what it remembers of earlier steps.
        scale: the guidance scale.
        caches: the values of the last steps that kept one, each with its step, by kind and site.
        conditions: the further inputs of the graphs that are left, by half and source.
    """

    plan: Sequence[PlannedPhase]
    call: int
    latents: Array
    scheduler: Scheduler
    scale: float
    caches: Mapping[tuple[Kind, str], Sequence[tuple[int, Array]]]
    conditions: Conditions


class Planner(BundlePipeline):
    """Runs a call up to the gate. It never opens the graphs after it, nor the VAE's decoder."""

    def plan(self, prompt: str, **call: Any) -> Handover:
        """Return what is to be handed over."""
        handover: Any = self([prompt], **call, output="numpy")
        assert isinstance(handover, Handover)
        return handover

    def _denoised(
        self, denoiser: Denoiser, noise: Array, noise_scheduler: Scheduler, scale: float, callback: Any
    ) -> Any:
        warm_up = noise_scheduler.warm_up
        current = noise * np.float32(noise_scheduler.initial_sigma)
        for call, timestep in enumerate(noise_scheduler.timesteps):
            step = max(call - warm_up, 0)
            if not denoiser._plan[step].phase.guided:
                return self._handover(denoiser, call, step, current, noise_scheduler, scale)
            prediction = denoiser(step, noise_scheduler.model_input(current, call), timestep.item(), scale)
            current = noise_scheduler.step(prediction, call, current)
        raise SystemExit("This call has no steps without guidance, so there is nothing to hand over.")

    def _handover(
        self, denoiser: Denoiser, call: int, step: int, latents: Array, scheduler: Scheduler, scale: float
    ) -> Handover:
        graphs = self._manifest.graphs
        left = dict.fromkeys(planned.graph for planned in denoiser._plan[step:] if planned.graph is not None)
        names = {each for name in left for each in (name, *early_graphs(graphs, name))}
        sources = {self._components.arguments[spec.name] for name in names for spec in graphs[name].inputs}
        keep = self._manifest.method.keep
        conditions = {
            keep: {source: value for source, value in denoiser._conditions[keep].items() if source in sources}
        }
        caches = {
            key: [(computed, value.numpy()) for computed, value in values] for key, values in denoiser._caches.items()
        }
        return Handover(denoiser._plan, call, latents, scheduler, scale, caches, conditions)

    def _decoded(self, latents: Array) -> Array:
        return latents  # what is handed over instead


class Finisher(BundlePipeline):
    """Runs a call from the gate on. It never opens the graphs before it, nor a text encoder."""

    def finish(self, handed: Handover) -> Array:
        """Return the image, [height, width, 3], with values in [0, 1]."""
        denoiser = Denoiser(self._graphs, self._manifest, self._folder, handed.plan, handed.conditions)
        denoiser._caches = {
            key: [(computed, _ort_value(value)) for computed, value in values] for key, values in handed.caches.items()
        }
        current, scheduler = handed.latents, handed.scheduler
        for call, timestep in [*enumerate(scheduler.timesteps)][handed.call :]:
            step = max(call - scheduler.warm_up, 0)
            prediction = denoiser(step, scheduler.model_input(current, call), timestep.item(), handed.scale)
            current = scheduler.step(prediction, call, current)
        image: Array = self.decode(current)[0]
        return image


def _ort_value(array: Array) -> OrtValue:
    import onnxruntime

    value: OrtValue = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return value


@dataclass(frozen=True)
class Held:
    """What a process has held at its end.

    Attributes:
        graphs: the names of the graphs that it has opened.
        megabytes: the most memory that it has taken.
    """

    graphs: tuple[str, ...]
    megabytes: float


def _held(pipeline: BundlePipeline) -> Held:
    return Held(pipeline.open_graphs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _plan(folder: Path, calls: Connection, handed: Connection, held: Connection) -> None:
    pipeline = Planner(folder, threads=1)
    while (call := calls.recv()) is not None:
        handed.send_bytes(pickle.dumps(pipeline.plan(**call)))
    handed.send_bytes(b"")
    held.send(_held(pipeline))


def _finish(folder: Path, handed: Connection, results: Connection) -> None:
    pipeline = Finisher(folder, threads=1)
    while data := handed.recv_bytes():
        results.send((len(data), pipeline.finish(pickle.loads(data))))
    results.send(_held(pipeline))


def run_apart(folder: Path, calls: Sequence[Mapping[str, Any]]) -> tuple[list[Array], int, dict[str, Held]]:
    """Make images in two processes.

    Returns:
        The images, the bytes handed over for each, and what the processes have held.
    """
    context = multiprocessing.get_context("spawn")
    (to_take, to_give), (taken, given), (images, made), (report, reported) = (
        context.Pipe(duplex=False) for _ in range(4)
    )
    planner = context.Process(target=_plan, args=(folder, to_take, given, reported))
    finisher = context.Process(target=_finish, args=(folder, taken, made))
    for process in (planner, finisher):
        process.start()
    for end in (to_take, given, reported, taken, made):
        end.close()  # the processes have their own, so that the end of one is noticed here
    try:
        for call in (*calls, None):
            to_give.send(call)
        results = [images.recv() for _ in calls]
        held = {"planner": report.recv(), "finisher": images.recv()}
    finally:
        for process in (planner, finisher):
            process.join(10)
            process.kill()
    sizes = {size for size, _ in results}
    return [image for _, image in results], max(sizes), held


def prototype(folder: Path, count: int) -> dict[str, Any]:
    """Compare two processes with one, and return the figures."""
    calls = [{"prompt": f"a large red circle, number {number}", "seed": number} for number in range(count)]
    pipeline = BundlePipeline(folder, threads=1)
    began = time.perf_counter()
    expected = [pipeline(**call, output="numpy") for call in calls]
    seconds = time.perf_counter() - began
    images, nbytes, held = run_apart(folder, calls)
    equal = all(np.array_equal(image, target) for image, target in zip(images, expected, strict=True))
    print(f"{count} images, {'equal' if equal else 'DIFFERENT'}; {nbytes:,} bytes handed over for each")
    for name, process in {**held, "one process": _held(pipeline)}.items():
        print(f"{name:12} at most {process.megabytes:6.0f} MB, graphs: {', '.join(process.graphs)}")
    print(f"one process with everything took {seconds / count:.2f} s per image")
    if not equal:
        raise SystemExit(1)
    return {"images": count, "bytes": nbytes, "graphs": {name: process.graphs for name, process in held.items()}}


def on_paper(name: str, gates: Sequence[int]) -> list[dict[str, Any]]:
    """Return what is handed over and held, and the images per second, for a model of real size."""
    from math import prod

    from tgate_compile.methods.method import CROSS, Phase
    from tgate_compile.study.architectures import ALL_MODELS, Geometry
    from tgate_compile.study.cost import _captured, graph_cost

    model = ALL_MODELS[name]
    size, steps = model.architecture.size, model.steps
    captured = _captured(model.architecture, Geometry(model.rows, size, size))
    # A cache has one row for each image.
    elements = sum(prod(site.shape) // model.rows for site in captured.sites if site.kind == "cross")
    latents = captured.program.graph_signature.user_inputs.index(captured.latents)
    shape = next(node.meta["val"].shape for node in captured.program.graph.nodes if node.name == captured.latents)
    assert latents == 0
    elements += prod(shape) // model.rows
    full, pruned = (
        graph_cost(model.architecture, Geometry(rows, size, size), phase, None)
        for rows, phase in ((model.rows, Phase(True, merge=CROSS)), (1, Phase(False, reuse=CROSS)))
    )
    rows = []
    for gate in gates:
        before, after = gate * full.macs.total, (steps - gate) * pruned.macs.total
        row = {
            "model": name,
            "steps": steps,
            "gate": gate,
            "handed_mb": elements * HALF / 1e6,
            **{f"handed_ms_at_{speed}": elements * HALF / rate * 1e3 for speed, rate in NETWORKS.items()},
            "parameters_b": sum(full.parameters.values()) / 1e9,
            "finisher_parameters_b": sum(pruned.parameters.values()) / 1e9,
            "full_step_tmacs": full.macs.total / 1e12,
            "pruned_step_tmacs": pruned.macs.total / 1e12,
            "share_before_gate": before / (before + after),
        }
        for replicas in REPLICAS:
            # Images per time, relative to as many replicas that hold everything and share the work evenly.
            best = max(min(planners / before, (replicas - planners) / after) for planners in range(1, replicas))
            row[f"speed_{replicas}"] = best * (before + after) / replicas
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the prototype, or print the table on paper."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle with all components; the default is the embedded model's")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--paper", action="store_true", help="count for models of real size instead")
    parser.add_argument("--models", nargs="+", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--out", type=Path, help="a JSON file to write the figures to")
    given = parser.parse_args(arguments)
    if given.paper:
        figures: Any = []
        for name in given.models:
            figures += on_paper(name, PAPER[name])
            print(*(json.dumps(row) for row in figures[-len(PAPER[name]) :]), sep="\n", flush=True)
    elif given.bundle is not None:
        figures = prototype(given.bundle, given.images)
    else:
        import tgate_compile

        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder, "bundle")
            pipe = tgate_compile.optimize(tgate_compile.load_demo_pipeline(), 10, backend="eager")
            tgate_compile.export(pipe, bundle, call={"prompt": "", "num_inference_steps": 25}, components="all")
            figures = prototype(bundle, given.images)
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
