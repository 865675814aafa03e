"""Compare images of the runtime without PyTorch with those of the pipelines in PyTorch, and measure bundle sizes.

    python benchmarks/runtime_parity.py --out benchmarks/results/runtime_parity.json
    python benchmarks/runtime_parity.py --only sd-fp32 --keep bundles       # existing bundles are reused

The embedded pipelines are exported with T-GATE and all components. Both sides draw the same prompts from the same
latents: one prompt, two prompts, and two prompts with negative prompts. The schedulers use the pipeline's
configuration, except for the timestep spacing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import torch

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile.runtime import BundlePipeline
from tgate_compile.runtime._noise import NAMES
from tgate_compile.study.bench.measure import machine_of

STEPS, GATE = 10, 4
PROMPTS = ["a large red circle on a blue background", "a small green star on a white background"]
NEGATIVE = ["a yellow square", "a large black triangle"]
#: Shape of the latents of one image.
LATENTS = (4, 16, 16)
SPACINGS = ("leading", "linspace", "trailing")
#: A program that makes one image, to measure its cost from the start of Python.
PROGRAM = (
    "import sys; from tgate_compile.runtime import BundlePipeline; BundlePipeline(sys.argv[1], threads=1)(sys.argv[2])"
)


@dataclass(frozen=True)
class Contender:
    """A pipeline and the schedulers to compare with it."""

    model: str
    dtype: torch.dtype = torch.float32
    schedulers: tuple[str, ...] = ("dpm++",)
    spacings: tuple[str | None, ...] = (None,)


CONTENDERS = {
    "sd-fp32": Contender("sd", torch.float32, tuple(NAMES), SPACINGS),
    "sd-fp16": Contender("sd", torch.float16, tuple(NAMES), SPACINGS),
    "sdxl-fp32": Contender("sdxl"),
    "pixart-fp32": Contender("pixart"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeat", type=int, default=5, help="number of runs of the program")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the bundles")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        home = options.keep or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        rows = {}
        for name in options.only:
            rows[name] = row = measured(CONTENDERS[name], home / name, options.repeat)
            print(name, json.dumps({key: value for key, value in row.items() if key != "cases"}), flush=True)
    results = {
        "command": " ".join(
            ["python", "benchmarks/runtime_parity.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine_of(torch.device("cpu")) | {"onnxruntime": onnxruntime.__version__},
        "steps": STEPS,
        "gate": GATE,
        "prompts": PROMPTS,
        "negative_prompts": NEGATIVE,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def measured(contender: Contender, folder: Path, repeat: int) -> dict[str, Any]:
    """Return the PSNR of each case, the lowest of each scheduler, sizes, and the processor time of the program."""
    pipe = tgate_compile.load_demo_pipeline(contender.model, torch_dtype=contender.dtype)
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    variant = demo_variant(contender.model)
    call = {**variant.call, "num_inference_steps": STEPS, "guidance_scale": variant.guidance}
    if not folder.exists():
        tgate_compile.export(pipe, folder, call={"prompt": "", **call}, dynamic=("batch",), components="all")
    cases = list(likeness(pipe, folder, contender, call))
    found = {name: [case["psnr"] for case in cases if case["scheduler"] == name] for name in contender.schedulers}
    return {
        "psnr_least": {name: min((x for x in psnrs if x is not None), default=None) for name, psnrs in found.items()},
        "not_finite": sorted({(c["scheduler"], c["spacing"]) for c in cases if c["psnr"] is None}),
        "bytes": sizes(folder),
        "first_image_cpu_s": min(program_cpu_s(folder) for _ in range(repeat)),
        "cases": cases,
    }


def likeness(pipe: Any, folder: Path, contender: Contender, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each case with its PSNR in dB; None if the pipeline's image is not finite in its dtype."""
    noise = torch.randn((2, *LATENTS), generator=torch.Generator().manual_seed(0))
    own = dict(pipe.scheduler.config)
    for spacing in contender.spacings:
        config = own if spacing is None else own | {"timestep_spacing": spacing}
        runtime = with_scheduler_config(folder, config)
        for name in contender.schedulers:
            pipe.scheduler = getattr(diffusers, NAMES[name]).from_config(config)
            for prompts, negative in ((PROMPTS[:1], None), (PROMPTS, None), (PROMPTS, NEGATIVE)):
                latents = noise[: len(prompts)]
                texts = {} if negative is None else {"negative_prompt": negative}
                expected = pipe(prompts, latents=latents.to(contender.dtype), output_type="np", **texts, **call).images
                images = runtime(
                    prompts,
                    negative,
                    latents=latents.to(contender.dtype).float().numpy(),
                    scheduler=name,
                    num_inference_steps=STEPS,
                    output="numpy",
                )
                yield {
                    "scheduler": name,
                    "spacing": config["timestep_spacing"],
                    "images": len(prompts),
                    "negative_prompts": negative is not None,
                    "psnr": psnr(images, expected),
                }


def with_scheduler_config(folder: Path, config: dict[str, Any]) -> BundlePipeline:
    """Open the bundle after changing the timestep spacing of the scheduler in its manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["scheduler"]["config"] |= {"timestep_spacing": config["timestep_spacing"]}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return BundlePipeline(folder)


def psnr(images: Any, expected: np.ndarray[Any, Any]) -> float | None:
    if not np.isfinite(expected).all():
        return None
    error = float(np.square(np.asarray(images, np.float64) - expected).mean())
    return -10 * math.log10(max(error, 1e-20))


def sizes(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of the denoiser's files, the components' files, and the manifest."""
    found = {"denoiser": 0, "components": 0, "manifest": 0}
    for file in folder.rglob("*"):
        if file.is_file():
            kind = {"graphs": "denoiser", "components": "components"}.get(file.relative_to(folder).parts[0], "manifest")
            found[kind] += file.stat().st_size
    return found


def program_cpu_s(folder: Path) -> float:
    """Return the processor time in seconds of a program that makes one image with the bundle's default steps."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder), PROMPTS[0]], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))


if __name__ == "__main__":
    main()
