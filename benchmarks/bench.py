"""Time plain and gated generation side by side: one process, in alternation, per step and per image.

    python benchmarks/bench.py --model demo
    python benchmarks/bench.py --model sd15
    python benchmarks/bench.py --model sdxl --device cuda

Contenders, all on the same weights and inputs:

- `plain eager`, `plain compiled`: the pipeline as it is, and with `torch.compile(unet, fullgraph=True)`;
- `guidance drop`: the plain eager pipeline, guidance stopped at the gate, nothing cached. What T-GATE adds to that is
  the difference to the next row;
- `tgate eager`, `tgate compiled`, `tgate onnxruntime`: `tgate_compile.optimize` with each backend;
- `plain onnxruntime`: the same with a gate beyond the last step: what the runtime alone brings.

The efficiency is the speedup over the plain row of the same kind, divided by the ratio of the multiply-accumulates
(linear and convolution layers, the paper's convention): 1 means that every operation saved was time saved.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

import tgate_compile

CONTENDERS = (
    "plain eager",
    "plain compiled",
    "plain onnxruntime",
    "guidance drop",
    "tgate eager",
    "tgate compiled",
    "tgate onnxruntime",
)
BASELINE = {
    "guidance drop": "plain eager",
    "tgate eager": "plain eager",
    "tgate compiled": "plain compiled",
    "tgate onnxruntime": "plain onnxruntime",
}
BACKENDS = {
    "plain onnxruntime": "onnxruntime",
    "tgate eager": "eager",
    "tgate compiled": "inductor",
    "tgate onnxruntime": "onnxruntime",
}
NEVER = 1000  # a gate beyond the last step


@dataclass
class Row:
    """Times of one contender, in seconds."""

    contender: str
    images: list[float] = field(default_factory=list)
    full_steps: list[float] = field(default_factory=list)
    late_steps: list[float] = field(default_factory=list)
    first_call: float = 0.0
    error: str | None = None

    @property
    def image(self) -> float:
        return statistics.median(self.images)


@dataclass(frozen=True)
class Workload:
    """A pipeline and the arguments of its call."""

    pipe: Any
    arguments: dict[str, Any]


def demo(device: str, dtype: torch.dtype) -> Workload:
    pipe = tgate_compile.load_demo_pipeline(torch_dtype=dtype).to(device)
    return Workload(pipe, {"prompt": "a large red circle on a blue background", "guidance_scale": 5.0})


def sd15(device: str, dtype: torch.dtype, size: int = 32) -> Workload:
    """SD-1.5's UNet with random weights, at `size` x `size` latents (the real one: 64)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=size, cross_attention_dim=768).to(device, dtype).eval()
    pipe = StableDiffusionPipeline(
        _vae(), None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )  # fmt: skip
    embeds = torch.randn(1, 77, 768, device=device, dtype=dtype)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "output_type": "latent"}
    return Workload(pipe, {**arguments, "height": 8 * size, "width": 8 * size, "guidance_scale": 7.5})


def sdxl(device: str, dtype: torch.dtype, size: int = 128) -> Workload:
    """SDXL's UNet with random weights, at 128 x 128 latents (1024 px)."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=size,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    pipe = StableDiffusionXLPipeline(_vae(), None, None, None, None, unet.to(dtype).eval(), DDIMScheduler())
    embeds = torch.randn(1, 77, 2048, device=device, dtype=dtype)
    pooled = torch.randn(1, 1280, device=device, dtype=dtype)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": torch.zeros_like(embeds),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
        "output_type": "latent",
    }
    return Workload(pipe, {**arguments, "height": 8 * size, "width": 8 * size, "guidance_scale": 5.0})


def _vae() -> AutoencoderKL:
    # Never run: it only tells the pipeline that latents are eight times smaller than images.
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


MODELS: dict[str, Callable[..., Workload]] = {"demo": demo, "sd15": sd15, "sdxl": sdxl}


def contender_pipeline(workload: Workload, contender: str, gate: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline of its own for `contender`, on the workload's weights, and what its call needs besides."""
    source = workload.pipe
    shared = {id(tensor): tensor for tensor in (*source.unet.parameters(), *source.unet.buffers())}
    unet = copy.deepcopy(source.unet, memo=shared)
    pipe = copy.copy(source)
    pipe.unet, pipe.scheduler = unet, copy.deepcopy(source.scheduler)
    pipe.set_progress_bar_config(disable=True)
    if contender == "plain compiled":
        pipe.unet = torch.compile(unet, fullgraph=True)
    elif contender == "guidance drop":
        cutoff = SDXLCFGCutoffCallback if isinstance(pipe, StableDiffusionXLPipeline) else SDCFGCutoffCallback
        return pipe, {"callback_on_step_end": cutoff(cutoff_step_ratio=None, cutoff_step_index=gate - 1)}
    elif contender in BACKENDS:
        tgate_compile.optimize(pipe, NEVER if contender.startswith("plain") else gate, backend=BACKENDS[contender])
    return pipe, {}


def timed_image(
    pipe: Any, arguments: dict[str, Any], steps: int, synchronize: Callable[[], None]
) -> tuple[float, list[float]]:
    """Seconds for one image, and for each of its steps (from one scheduler step to the next)."""
    marks: list[float] = []
    step = type(pipe.scheduler).step

    def marked(*args: Any, **kwargs: Any) -> Any:
        result = step(pipe.scheduler, *args, **kwargs)
        synchronize()
        marks.append(time.perf_counter())
        return result

    pipe.scheduler.step = marked
    try:
        synchronize()
        began = time.perf_counter()
        pipe(**arguments, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        synchronize()
        elapsed = time.perf_counter() - began
    finally:
        del pipe.scheduler.step
    return elapsed, [after - before for before, after in itertools.pairwise([began, *marks])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="float32 on cpu, else bfloat16")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--gate-step", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=5, help="images per contender; the median counts")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    synchronize = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    workload = MODELS[options.model](options.device, dtype)
    rows = {name: Row(name) for name in options.contenders}
    pipes: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, row in rows.items():
        print(f"preparing {name} ...", file=sys.stderr, flush=True)
        try:
            pipes[name] = contender_pipeline(workload, name, options.gate_step)
            pipe, extra = pipes[name]
            row.first_call, _ = timed_image(pipe, workload.arguments | extra, options.steps, synchronize)
        except Exception as error:  # a contender that cannot run is a row with its error
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            pipes.pop(name, None)
    for turn in range(options.repeat):
        print(f"round {turn + 1} of {options.repeat}", file=sys.stderr, flush=True)
        for name, (pipe, extra) in pipes.items():
            elapsed, durations = timed_image(pipe, workload.arguments | extra, options.steps, synchronize)
            rows[name].images.append(elapsed)
            # The first step includes the text encoder and set-up.
            rows[name].full_steps.append(statistics.median(durations[1 : options.gate_step]))
            rows[name].late_steps.append(statistics.median(durations[options.gate_step :]))

    ratio, ratio_total = macs_ratios(pipes, options.gate_step, options.steps)
    report(rows, ratio, ratio_total)
    if options.out:
        environment = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": device_name(options.device),
        }
        figures = {
            "command": "python " + " ".join(sys.argv),
            "environment": environment,
            "macs_ratio": ratio,
            "macs_ratio_with_attention": ratio_total,
            "rows": [asdict(row) for row in rows.values()],
        }
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


def macs_ratios(pipes: dict[str, tuple[Any, dict[str, Any]]], gate: int, steps: int) -> tuple[float, float]:
    """Plain over gated multiply-accumulates of an image: layers only, and with attention's products."""
    gated = next((pipe for name, (pipe, _) in pipes.items() if name.startswith("tgate")), None)
    if gated is None:
        return float("nan"), float("nan")
    full, pruned = ({v.name: v for v in tgate_compile.describe(gated).variants}[name] for name in ("full", "pruned"))
    return (
        steps * full.macs / (gate * full.macs + (steps - gate) * pruned.macs),
        steps * full.macs_total / (gate * full.macs_total + (steps - gate) * pruned.macs_total),
    )


def report(rows: dict[str, Row], ratio: float, ratio_total: float) -> None:
    print(f"MACs ratio, plain / gated: {ratio:.3f} (with attention's own products {ratio_total:.3f})\n")
    print(
        "| contender | image/s | full step/ms | late step/ms | vs plain eager | vs plain compiled | efficiency "
        "| first call/s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows.values():
        if row.error or not row.images:
            print(f"| {row.contender} | {row.error} |||||||")
            continue
        against = {
            name: f"{rows[name].image / row.image:.2f}x" if name in rows and rows[name].images else "-"
            for name in CONTENDERS[:2]
        }
        baseline = rows.get(BASELINE.get(row.contender, ""))
        efficiency = f"{baseline.image / row.image / ratio:.3f}" if baseline and baseline.images else "-"
        full, late = statistics.median(row.full_steps) * 1e3, statistics.median(row.late_steps) * 1e3
        print(
            f"| {row.contender} | {row.image:.3f} | {full:.1f} | {late:.1f} | {against['plain eager']} | "
            f"{against['plain compiled']} | {efficiency} | {row.first_call:.1f} |"
        )


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
