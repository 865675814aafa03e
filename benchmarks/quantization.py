"""Measure the effect of quantization on size, time of a step, PSNR and accuracy.

    python benchmarks/quantization.py --out benchmarks/results/quantization.json
    python benchmarks/quantization.py --model pixart
    python benchmarks/quantization.py --formats onnx --keep bundles          # existing bundles are reused

An embedded pipeline is exported in each format that supports quantization, without it and with each scheme, and loaded
again. All bundles draw the same held-out captions from the same noise and take turns after each batch, so that other
load on the machine affects all of them. PSNR is relative to the images of the float graphs in PyTorch. The attribute
reader decides whether an image shows everything in its caption.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.quantization import CALIBRATED
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.study.bench.measure import machine_of, timed_generation
from tgate_compile.study.evaluation.measure import log_likelihood, right

GATES = {"sd": 10, "sdxl": 10, "pixart": 8, "lcm": 2}
CAPTION_SEED = 2026
#: For calibrated schemes; the captions differ from those that are drawn.
CALIBRATION_SEED = 7
CALIBRATION_PROMPTS = 4


@dataclass(frozen=True)
class Contender:
    """A bundle, or without a format the graphs in PyTorch."""

    format: str | None
    scheme: str | None = None
    graphs: str = "all"

    @property
    def bundle(self) -> str:
        return f"{self.format}-{self.scheme or 'float'}" + ("" if self.graphs == "all" else f"-{self.graphs}")

    @property
    def name(self) -> str:
        if self.format is None:
            return "PyTorch, eager"
        only = "" if self.graphs == "all" else f", {self.graphs} graph alone"
        return f"{self.format}, {self.scheme or 'float32'}{only}"


@dataclass
class Drawn:
    """The images of a contender, and the times of its steps by graph."""

    images: list[np.ndarray] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Model:
    """An embedded pipeline and the settings of its images."""

    name: str

    @property
    def gate(self) -> int:
        return GATES[self.name]

    @property
    def call(self) -> Mapping[str, Any]:
        variant = demo_variant(self.name)
        return {"num_inference_steps": variant.steps, "guidance_scale": variant.guidance, **variant.call}

    def plain(self) -> Any:
        pipe: Any = tgate_compile.load_demo_pipeline(self.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def contenders(formats: list[str], schemes: list[str] | None) -> list[Contender]:
    chosen = [Contender(None)]
    for format in formats:
        taken = [scheme for scheme in FORMATS[format].schemes if schemes is None or scheme in schemes]
        chosen += [Contender(format, scheme) for scheme in (None, *taken)]
        if format == "onnx" and schemes is None:
            chosen.append(Contender(format, "int8", "pruned"))
    return chosen


def exported(contender: Contender, model: Model, home: Path, batch: int | None) -> tuple[Path, float | None]:
    """Return the folder of a bundle with a dynamic batch, or a fixed one if `batch` is given, and its export time.

    The time is None if the bundle already existed.
    """
    folder = home / "-".join([model.name, contender.bundle, *([] if batch is None else [str(batch)])])
    if folder.exists():
        return folder, None
    assert contender.format is not None
    quantize: dict[str, Any] | None = None
    if contender.scheme is not None:
        quantize = {"scheme": contender.scheme, "graphs": contender.graphs}
    call: dict[str, Any] = {"prompt": "", **model.call}
    if batch is not None:  # calibration uses these prompts as well
        call["prompt"] = held_out_captions(batch, CALIBRATION_SEED, objects=2)
    elif quantize is not None and contender.scheme in CALIBRATED:
        quantize["calibration_prompts"] = held_out_captions(CALIBRATION_PROMPTS, CALIBRATION_SEED, objects=2)
    pipe = model.plain()
    tgate_compile.optimize(pipe, model.gate, backend="eager")
    began = time.perf_counter()
    free = ("batch",) if batch is None else False
    tgate_compile.export(pipe, folder, contender.format, call=call, dynamic=free, quantize=quantize)
    return folder, time.perf_counter() - began


def draw(pipe: Any, model: Model, prompts: list[str], latents: torch.Tensor, drawn: Drawn) -> None:
    call = {**model.call, "prompt": prompts, "latents": latents.clone(), "output_type": "np"}
    timed = timed_generation(pipe, call, seed=0)
    drawn.images.append(timed.output)
    for step, seconds in enumerate(timed.steps):
        if step not in (0, model.gate):  # these may open a graph
            drawn.seconds["full" if step < model.gate else "pruned"].append(seconds)


def psnr(images: np.ndarray, others: np.ndarray) -> list[float]:
    errors = ((images.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    return [200.0 if error == 0 else -10 * math.log10(error) for error in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(GATES), default="sd")
    parser.add_argument("--formats", nargs="+", default=[name for name, row in FORMATS.items() if row.schemes])
    parser.add_argument("--schemes", nargs="+", help="default: all schemes that the formats support")
    parser.add_argument("--captions", type=int, default=64, help="captions, half of them with two objects")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--static", action="store_true", help="fix the batch, even of formats that can leave it dynamic"
    )
    parser.add_argument("--keep", type=Path, help="folder in which to keep the bundles")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    fixed = arguments.static or any(FORMATS[name].fixed_sizes for name in arguments.formats)
    if fixed and arguments.captions % arguments.batch:
        parser.error("--captions must be a multiple of --batch, because the batch is fixed")
    torch.set_num_threads(arguments.threads)
    if "executorch" in arguments.formats:  # it uses all cores by default
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(arguments.threads)
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        result = measured(arguments, arguments.keep or Path(temporary))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measured(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    half = arguments.captions // 2
    captions = [
        *held_out_captions(arguments.captions - half, CAPTION_SEED, objects=1),
        *held_out_captions(half, CAPTION_SEED, objects=2),
    ]
    rows: list[dict[str, Any]] = []
    pipes: list[Any] = []
    model = Model(arguments.model)
    for contender in contenders(arguments.formats, arguments.schemes):
        print(contender.name, file=sys.stderr, flush=True)
        pipe = model.plain()
        if contender.format is None:
            tgate_compile.optimize(pipe, model.gate, backend="eager")
            rows.append({"name": contender.name})
        else:
            fixed = arguments.static or FORMATS[contender.format].fixed_sizes
            folder, seconds = exported(contender, model, home, arguments.batch if fixed else None)
            own: Any = {"threads": arguments.threads} if contender.format in ("onnx", "openvino") else None
            tgate_compile.load(pipe, folder, backend_options=own)
            rows.append({"name": contender.name, "export_s": seconds, **_about(folder)})
        pipes.append(pipe)
    size = (pipes[0].transformer if model.name == "pixart" else pipes[0].unet).config.sample_size
    latents = torch.randn((len(captions), 4, size, size), generator=torch.Generator().manual_seed(0))
    drawn = [Drawn() for _ in pipes]
    for at in range(0, len(captions), arguments.batch):
        print(f"{at} of {len(captions)} captions", file=sys.stderr, flush=True)
        for pipe, one in zip(pipes, drawn, strict=True):
            draw(pipe, model, captions[at : at + arguments.batch], latents[at : at + arguments.batch], one)
    reader = AttributeReader.load()
    expected = np.concatenate(drawn[0].images)
    for row, pipe, one in zip(rows, pipes, drawn, strict=True):
        images = np.concatenate(one.images)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
        judged = right(reader, pixels, captions)
        each = psnr(images, expected)
        row |= {
            "psnr_mean": sum(each) / len(each),
            "psnr_least": min(each),
            "right": judged.mean().item(),
            "log_likelihood": log_likelihood(reader, pixels, captions).mean().item(),
            "step_ms": {
                graph: {"least": 1e3 * min(some), "median": 1e3 * median(some)} for graph, some in one.seconds.items()
            },
            "runs": type(required_state_of(pipe).hook.store).__name__,
        }
    return {
        "command": " ".join(["python", "benchmarks/quantization.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine_of(torch.device("cpu")),
        "captions": len(captions),
        "batch": arguments.batch,
        "model": model.name,
        "steps": model.call["num_inference_steps"],
        "gate": model.gate,
        "rows": rows,
    }


def _about(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "bytes": sum(file["size"] for file in manifest["files"].values()),
        "weights_bytes": manifest["files"].get("graphs/weights.bin", {}).get("size"),
        "parity": {name: graph["parity"] and graph["parity"]["relative"] for name, graph in manifest["graphs"].items()},
        "runtime": manifest["versions"]["runtime"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | bundle / MB | full / ms | pruned / ms | PSNR / dB | least | right / % | likelihood |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        size = f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else ""
        full, pruned = (row["step_ms"][graph]["least"] for graph in ("full", "pruned"))
        same = row["psnr_mean"] == 200
        likeness = "| |" if same else f"| {row['psnr_mean']:.1f} | {row['psnr_least']:.1f}"
        lines.append(
            f"| {row['name']} | {size} | {full:.1f} | {pruned:.1f} {likeness} | {100 * row['right']:.1f} "
            f"| {row['log_likelihood']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
