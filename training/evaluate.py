"""Does the pipeline follow captions it was never trained on? The attribute reader decides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions

CAPTION_SEED = 2024
_BATCH = 32


@dataclass(frozen=True)
class Evaluation:
    """How images are made for a measurement."""

    singles: int = 256
    pairs: int = 128
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0


def evaluate(pipeline: StableDiffusionPipeline, setting: Evaluation) -> dict[str, object]:
    """Accuracies per attribute on held-out captions, with everything needed to repeat the measurement."""
    reader = AttributeReader.load()
    pipeline.set_progress_bar_config(disable=True)
    result: dict[str, object] = asdict(setting) | {"caption_seed": CAPTION_SEED}
    for kind, objects, n in (("single", 1, setting.singles), ("pair", 2, setting.pairs)):
        captions = held_out_captions(n, CAPTION_SEED, objects)
        start = time.perf_counter()
        images = generate(
            pipeline, captions, steps=setting.steps, guidance=setting.guidance, seed=setting.seed
        )
        seconds = time.perf_counter() - start
        accuracy = {name: round(share, 4) for name, share in reader.score(images, captions).items()}
        result[kind] = {"captions": n, "accuracy": accuracy, "seconds": round(seconds, 1)}
    return result


def generate(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], *, steps: int, guidance: float, seed: int
) -> list[Image.Image]:
    """One image per caption, each from noise of its own: independent of the size of the batches."""
    images: list[Image.Image] = []
    for at in range(0, len(captions), _BATCH):
        batch = list(captions[at : at + _BATCH])
        noise = [torch.Generator().manual_seed(seed * 1_000_000 + at + i) for i in range(len(batch))]
        images += pipeline(batch, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    return images
