r"""Measure what ending guidance and freezing the text does to the images of the embedded model with joint attention.

    python benchmarks/frozen_text.py --out docs/results/frozen_text.json
    python benchmarks/frozen_text.py --out docs/results/frozen_text_early.json \
        --checkpoint build/demo/unet_sd3/minute010.pt
    python benchmarks/frozen_text.py --out docs/results/frozen_text_unguided.json --guidance 1
    python benchmarks/frozen_text_plot.py docs/results/frozen_text.json --out docs/results/frozen_text.png

Each method of `METHODS` runs with each of `GATES`, and the plain pipeline in the numbers of steps that cost as much.
The images are made by `tgate_compile.evaluate`, which stores each one in `--images`, so the same command resumes an
interrupted run. The images of each seed are measured separately: the fractions with one object and with two that show
everything in their captions, PSNR and drift to the plain pipeline's, and the Frechet distance of the attribute reader's
features to drawn scenes of the same captions. The results contain mean and standard deviation over the seeds.

The shipped model gets nearly every caption right, so little can be lost. `--checkpoint` measures the same model earlier
in its training (`python -m training unet --family sd3` keeps a checkpoint every ten minutes), where losses show.
`--guidance 1` runs without guidance, as distilled models do, and leaves out the methods that end it.

Methods that this version does not support for the model are left out, and the results say why.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from findings import Judge, spread

import tgate_compile
from tgate_compile import AdaptiveGuidance, FrozenText, TGate, UnsupportedModelError
from tgate_compile._demo import demo_variant
from tgate_compile._demo.captions import held_out_captions
from tgate_compile.methods.method import Method
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.evaluation.images import Contender, Folder, contenders_of, write_json

logger = logging.getLogger(__name__)

MODEL, STEPS, BATCH = "sd3", 25, 32
CAPTION_SEED = 2029
#: Of as many numbers of steps, every second one is measured.
MANY = 6
GATES = (3, 5, 8, 10, 14)

#: The methods to compare, by a description of the steps from the gate on. A row may also be a combination, such as
#: `AdaptiveGuidance(gate) + ...`.
METHODS: Mapping[str, Callable[[int], Method | Schedule]] = {
    "guidance ends": AdaptiveGuidance,
    "text frozen": FrozenText,
    "text frozen, again every 5th": lambda gate: FrozenText(gate, 5),
    "hidden states frozen": lambda gate: FrozenText(gate, text="hidden"),
    "guidance ends, text frozen": TGate,
    "guidance ends, hidden states frozen": lambda gate: AdaptiveGuidance(gate) + FrozenText(gate, text="hidden"),
    "guidance ends, text frozen, again every 5th": lambda gate: TGate(gate, text_interval=5),
}


@dataclass(frozen=True)
class Task:
    """The settings of the measurement.

    Attributes:
        gates: the gates of each method.
        singles: number of captions with one object.
        pairs: number of captions with two.
        seeds: seeds of the noise.
        guidance: the guidance scale; None takes the model's own.
        fewer_steps: whether to measure the plain pipeline in fewer steps as well.
    """

    gates: Sequence[int]
    singles: int
    pairs: int
    seeds: Sequence[int]
    guidance: float | None = None
    fewer_steps: bool = True

    @property
    def scale(self) -> float:
        """The guidance scale."""
        return demo_variant(MODEL).guidance if self.guidance is None else self.guidance

    @property
    def captions(self) -> list[str]:
        """The captions, those with one object first; none of them was used for training."""
        return [
            *held_out_captions(self.singles, CAPTION_SEED, objects=1),
            *held_out_captions(self.pairs, CAPTION_SEED, objects=2),
        ]


def pipeline(checkpoint: Mapping[str, Any] | None = None) -> Any:
    """Return the plain pipeline, with the averaged weights of a checkpoint of its training, if there is one."""
    pipe: Any = tgate_compile.load_demo_pipeline(MODEL)
    if checkpoint is not None:
        pipe.transformer.load_state_dict(checkpoint["average"])
    return pipe


def training_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return how long a checkpoint was trained; the minutes are processor time per worker."""
    minutes = round(checkpoint["seconds"] / 60, 1)
    return {"steps": checkpoint["step"], "samples": checkpoint["samples"], "cpu_minutes": minutes}


class Measurement:
    """The images of one pipeline, in a folder, and their measures."""

    def __init__(self, pipe: Any, task: Task, images: Path) -> None:
        self._pipe = pipe
        self._task = task
        self._folder = images
        self.judge = Judge(task.captions, task.singles, task.seeds)
        self.rows: dict[str, dict[str, Any]] = {}
        self.unsupported: dict[str, str] = {}

    def run(self, methods: Mapping[str, Callable[[int], Method | Schedule]]) -> None:
        """Measure every method at every gate, then the plain pipeline with as many operations."""
        for name, method in methods.items():
            given = {f"{name} at {gate}": method(gate) for gate in self._task.gates}
            try:
                self._measure(given)
            except UnsupportedModelError as error:
                logger.warning("%s: %s", name, error)
                self.unsupported[name] = str(error)
        costs = [row["cost"] for row in self.rows.values()]
        fewer = sorted({round(STEPS * cost) for cost in costs} - {STEPS}, reverse=True)
        fewer = [] if not self._task.fewer_steps else fewer if len(fewer) < MANY else fewer[::2]
        self._measure({f"{steps} steps": steps for steps in fewer})

    def _measure(self, given: Mapping[str, Method | Schedule | int]) -> None:
        if not given:
            return
        evaluation = tgate_compile.evaluate(
            self._pipe,
            given,
            self._task.captions,
            self._folder,
            seeds=self._task.seeds,
            num_inference_steps=STEPS,
            call={**demo_variant(MODEL).call, "guidance_scale": self._task.scale},
            batch_size=BATCH,
            progress=self._show,
        )
        plain, *others = contenders_of(given, STEPS)
        for contender in (plain, *others):
            if contender.label not in self.rows:
                self.rows[contender.label] = self._row(contender, plain, evaluation[contender.label])

    def _row(self, contender: Contender, plain: Contender, row: Any) -> dict[str, Any]:
        return {
            **contender.as_dict(),
            "strips": dict(row.strips),
            "cost": round(float(row.measures["cost"] or 0.0), 5),
            **self.judge(Folder(self._folder), contender, plain),
        }

    def _show(self, at: int, total: int, what: str) -> None:
        if at % BATCH == 0 or at == total:
            logger.info("%d of %d: %s", at, total, what)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| | MACs | singles / % | pairs / % | lost, gained | PSNR / dB | drift | Fréchet |",
        "| --- |" + " --: |" * 7,
    ]
    for label, row in rows.items():
        cells = [
            f"{row['cost']:.2f}",
            _cell(row, "singles", 1),
            _cell(row, "pairs", 1),
            f"{row['lost']}, {row['gained']}",
        ]
        cells += [_cell(row, "psnr", 1), _cell(row, "drift", 3), _cell(row, "frechet", 1)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{row[name]['mean']:.{digits}f} ± {row[name]['sd']:.{digits}f}" if name in row else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--images", type=Path, default=Path("build/frozen_text"), help="folder for the images")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of the model's training to measure instead")
    parser.add_argument("--gates", type=int, nargs="+", default=GATES)
    parser.add_argument("--singles", type=int, default=48, help="captions with one object (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=48, help="captions with two objects (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(0, 1, 2, 3, 4), help="seeds of the noise, at least two"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="the methods (default: all)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument("--no-fewer-steps", action="store_true", help="leave out the plain pipeline in fewer steps")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    fewer = not options.no_fewer_steps
    task = Task(options.gates, options.singles, options.pairs, options.seeds, options.guidance, fewer)
    checkpoint = None if options.checkpoint is None else torch.load(options.checkpoint, weights_only=True)
    name = "shipped" if checkpoint is None else f"step{checkpoint['step']}"
    name += "" if options.guidance is None else f"-guidance{options.guidance:g}"
    measurement = Measurement(pipeline(checkpoint), task, options.images / name)
    chosen = [name for name in METHODS if task.scale > 1 or not name.startswith("guidance ends")]
    measurement.run({name: METHODS[name] for name in chosen if options.methods is None or name in options.methods})
    result = {
        "command": "python benchmarks/frozen_text.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine_of(torch.device("cpu")),
        "model": MODEL,
        "guidance": task.scale,
        "training": None if checkpoint is None else training_of(checkpoint),
        "singles": task.singles,
        "pairs": task.pairs,
        "caption_seed": CAPTION_SEED,
        "seeds": list(task.seeds),
        "frechet_floor": spread(measurement.judge.floor),
        "rows": measurement.rows,
        "unsupported": measurement.unsupported,
    }
    write_json(options.out, result)
    print(table(measurement.rows))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
