"""Measure typical drifts of the final latents, for familiar changes and for schedules, on the embedded pipeline.

    python benchmarks/drift.py --out benchmarks/results/drift_embedded.json

Every run draws the same held-out captions from the same noise as the plain pipeline (25 steps, guidance 5). Drift is
||x - plain x|| / ||plain x|| of an image's final latents, as measured by `tgate_compile.tune`. The results also contain
the verdict of the attribute reader on the decoded images: "right" is the fraction that show everything in their
captions, and "lost" is the fraction of the plain pipeline's right images that are no longer right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tgate_compile
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions

STEPS, GUIDANCE, BATCH = 25, 5.0, 8
CALLS: dict[str, dict[str, Any]] = {
    **{f"{steps} steps": {"num_inference_steps": steps} for steps in (22, 20, 18, 15, 12, 10, 8)},
    **{f"guidance {scale:g}": {"guidance_scale": scale} for scale in (4.5, 4.0, 3.0, 2.0)},
    "other noise": {"noise": 1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    **{f"T-GATE, gate {gate}": {"gate_step": gate} for gate in (3, 5, 8, 10, 12, 15, 20)},
    **{f"T-GATE, gate {gate}, cond cached": {"gate_step": gate, "anchor_weight": 1.0} for gate in (3, 5, 10)},
    **{f"guidance drop {step}": {"gate_step": None, "guidance_step": step} for step in (3, 5, 10, 15)},
    "T-GATE v2, gate 10, sp 5": {"gate_step": 10, "sp_interval": 5},
    "DeepCache 2": {"gate_step": None, "deepcache_interval": 2},
    "DeepCache 3": {"gate_step": None, "deepcache_interval": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=96, help="half of them with one object, half with two")
    arguments = parser.parse_args()
    half = arguments.captions // 2
    captions = [*held_out_captions(half, 7), *held_out_captions(half, 7, objects=2)]

    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    reader = AttributeReader.load()
    plain = latents_of(pipe, captions)
    plain_right = right(pipe, reader, plain, captions)
    rows: dict[str, Any] = {"plain": {"drift": 0.0, "right": mean(plain_right), "lost": 0.0}}
    for name, options in {**CALLS, **SCHEDULES}.items():
        if name in SCHEDULES:
            tgate_compile.optimize(pipe, **options, backend="eager")
            latents = latents_of(pipe, captions)
            tgate_compile.restore(pipe)
        else:
            latents = latents_of(pipe, captions, **options)
        drift = (latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        seen = right(pipe, reader, latents, captions)
        rows[name] = {
            "drift": round(drift.mean().item(), 4),
            "spread": round(drift.std().item(), 4),
            "worst": round(drift.max().item(), 4),
            "right": mean(seen),
            "lost": mean([not now for now, before in zip(seen, plain_right, strict=True) if before]),
        }
        print(f"{name:26} {rows[name]}", flush=True)
    settings = {"captions": len(captions), "steps": STEPS, "guidance": GUIDANCE}
    arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


def latents_of(pipe: Any, captions: Sequence[str], noise: int = 0, **call: Any) -> torch.Tensor:
    """Return the final latents, [captions, 4, h, w]. Each image has a separate generator."""
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **call}
    drawn = []
    for at in range(0, len(captions), BATCH):
        batch = list(captions[at : at + BATCH])
        generators = [torch.Generator().manual_seed(noise * 1_000_000 + at + i) for i in range(len(batch))]
        drawn.append(pipe(batch, generator=generators, output_type="latent", **call).images)
    return torch.cat(drawn)


@torch.no_grad()
def right(pipe: Any, reader: AttributeReader, latents: torch.Tensor, captions: Sequence[str]) -> list[bool]:
    """Return, for each image, whether it shows everything in its caption."""
    images = torch.cat([pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample for x in latents.split(BATCH)])
    pixels = (images / 2 + 0.5).clamp(0, 1)
    return [reader.score(pixels[i : i + 1], [caption])["all"] == 1.0 for i, caption in enumerate(captions)]


def mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
