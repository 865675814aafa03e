"""Measure what computing in another precision does to the images of the embedded models.

    python benchmarks/precision.py --out benchmarks/results/precision.json
    python benchmarks/precision.py --models sd --backends eager --captions 2

Each embedded model draws held-out captions, all in one batch: the plain pipeline in float32, then optimized pipelines
in each precision, without a gate and with the model's usual one. PSNR is relative to the same schedule in float32, and
relative to the plain pipeline. The attribute reader decides whether an image shows everything in its caption. Times are
not measured here: `tgate-compile bench --precision bfloat16` does that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.evaluation.measure import right

GATES = {"sd": 10, "sdxl": 10, "pixart": 8, "lcm": 2}
CAPTION_SEED = 2026
_NEVER = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GATES), choices=list(GATES))
    parser.add_argument("--backends", nargs="+", default=["eager", "openvino"])
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    models = {name: measured(name, arguments) for name in arguments.models}
    rows = [row for name in models for row in summary(name, models[name], arguments)]
    result = {
        "command": " ".join(["python", "benchmarks/precision.py", *sys.argv[1:]]),
        "machine": machine_of(torch.device("cpu")),
        "captions": arguments.captions,
        "rows": rows,
        "models": models,
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


def summary(name: str, measured: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each backend and precision, as in docs/evidence/benchmarks.md."""
    rows = []
    for backend in arguments.backends:
        for precision in arguments.precisions:
            plain, gated = (
                measured[f"{title}, {backend}, {precision}"] for title in ("plain", f"T-GATE {GATES[name]}")
            )
            rows.append(
                {
                    "model": name,
                    "backend": backend,
                    "precision": precision,
                    "plain_psnr": plain["psnr_to_float32"],
                    "gated_psnr": gated["psnr_to_float32"],
                    "right": gated["right"],
                    "right_in_float32": measured[f"T-GATE {GATES[name]}"]["right"],
                }
            )
    return rows


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of one model by the name of the contender."""
    variant = demo_variant(name)
    pipe = tgate_compile.load_demo_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    captions = held_out_captions(arguments.captions, CAPTION_SEED)
    reader = AttributeReader.load()
    call = {"num_inference_steps": variant.steps, "guidance_scale": variant.guidance, **variant.call}

    def images(**options: Any) -> np.ndarray[Any, Any]:
        if options:
            tgate_compile.optimize(pipe, **options)
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
        drawn = pipe(captions, generator=noise, output_type="np", **call).images
        if options:
            tgate_compile.restore(pipe)
        return np.asarray(drawn)

    plain = images()
    rows: dict[str, Any] = {"plain": {"right": shown(reader, captions, plain)}}
    for gate in (_NEVER, GATES[name]):
        title = "plain" if gate == _NEVER else f"T-GATE {gate}"
        own = plain if gate == _NEVER else images(gate_step=gate, backend="eager")
        if gate != _NEVER:
            rows[title] = {"psnr_to_plain": psnr(own, plain), "right": shown(reader, captions, own)}
        for backend in arguments.backends:
            for precision in arguments.precisions:
                drawn = images(gate_step=gate, backend=backend, precision=precision)
                rows[f"{title}, {backend}, {precision}"] = {
                    "psnr_to_float32": psnr(drawn, own),
                    "psnr_to_plain": psnr(drawn, plain),
                    "right": shown(reader, captions, drawn),
                }
                print(name, title, backend, precision, rows[f"{title}, {backend}, {precision}"], flush=True)
    return rows


def psnr(images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float | None:
    """Return the mean PSNR in dB of images with values in [0, 1]; None if they are equal."""
    errors = ((images.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3))
    return None if not errors.all() else float(np.mean([-10 * math.log10(error) for error in errors]))


def shown(reader: AttributeReader, captions: list[str], images: np.ndarray[Any, Any]) -> int:
    """Return how many images show everything in their captions."""
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2)
    return int(right(reader, pixels, captions).sum())


if __name__ == "__main__":
    main()
