"""Measure the memory and time that exporting a large UNet with random weights takes.

    python benchmarks/export_memory.py --model sdxl --dtype float16
    python benchmarks/export_memory.py --model sd15

The peak is the kernel's `VmHWM`, reset before the export starts. It includes weights and mapped files. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet

import tgate_compile

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet(dtype: torch.dtype, config: dict[str, Any]) -> UNet:
    """Return a UNet created directly in `dtype`, because creating SDXL's in float32 first would determine the peak."""
    with torch.device("meta"):
        model = UNet(sample_size=64, **config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.02 if parameter.ndim > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * scale)
        for module in model.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                torch.nn.init.ones_(module.weight)
    return model


def workload(model: str, dtype: torch.dtype, size: int) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline and the arguments of a call with `size` x `size` latents."""
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    width = 2048 if model == "sdxl" else 768
    embeds = torch.randn(1, 77, width, dtype=dtype)
    call: dict[str, Any] = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
    call |= {"height": 8 * size, "width": 8 * size, "output_type": "latent", "num_inference_steps": 25}
    if model == "sd15":
        denoiser = unet(dtype, {"cross_attention_dim": 768})
        return StableDiffusionPipeline(
            vae, None, None, denoiser, DDIMScheduler(), None, None, requires_safety_checker=False
        ), call  # fmt: skip
    pooled = torch.randn(1, 1280, dtype=dtype)
    call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
    return StableDiffusionXLPipeline(vae, None, None, None, None, unet(dtype, SDXL), DDIMScheduler()), call


def memory(field: str) -> int:
    """Return a field of /proc/self/status, such as `VmRSS` or `VmHWM`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "sdxl"], default="sdxl")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float16")
    parser.add_argument("--size", type=int, default=32, help="size of the latents in the call; sizes stay dynamic")
    parser.add_argument("--static", action="store_true", help="fix all sizes")
    parser.add_argument("--folder", type=Path, help="folder in which to keep the bundle")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    pipe, call = workload(arguments.model, getattr(torch, arguments.dtype), arguments.size)
    weights = sum(tensor.nbytes for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers()))
    tgate_compile.optimize(pipe, gate_step=10, backend="eager")
    home = arguments.folder.parent if arguments.folder else Path(tempfile.mkdtemp())
    target = arguments.folder or home / "bundle"
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    began = time.perf_counter()
    stages: list[dict[str, Any]] = []

    def progress(stage: str) -> None:
        stages.append({"at_s": round(time.perf_counter() - began, 1), "stage": stage, "peak_so_far": memory("VmHWM")})
        print(f"{stages[-1]['at_s']:7.1f} s  {stages[-1]['peak_so_far'] / weights:5.2f} x  {stage}", file=sys.stderr)

    tgate_compile.export(pipe, target, call=call, dynamic=not arguments.static, progress=progress)
    seconds = time.perf_counter() - began
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    manifest = json.loads((target / "manifest.json").read_text())
    result = {
        "command": " ".join(["python", "benchmarks/export_memory.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "weights_bytes": weights,
        "resident_before_bytes": before,
        "peak_bytes": memory("VmHWM"),
        "peak_over_weights": memory("VmHWM") / weights,
        "seconds": seconds,
        "bundle_bytes": sum(files.values()),
        "bundle_over_weights": sum(files.values()) / weights,
        "files": files,
        "parity": {name: graph["parity"]["relative"] for name, graph in manifest["graphs"].items()},
        "stages": stages,
    }
    if arguments.folder is None:
        shutil.rmtree(home)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
