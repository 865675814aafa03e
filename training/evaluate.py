"""Does the pipeline follow captions it was never trained on? The attribute reader decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from training.train_reader import measure_reader

logger = logging.getLogger(__name__)

STEPS = 25
SINGLES, PAIRS = 256, 128
CAPTION_SEED = 2024
# The guidance scale is chosen on other held-out captions than those it is then measured on.
CHOICE_SINGLES, CHOICE_PAIRS = 64, 32
CHOICE_CAPTION_SEED = 2025
USUAL_GUIDANCE = 5.0
_BATCH = 32


def evaluate(pipeline: StableDiffusionPipeline, guidances: Sequence[float], *, seed: int) -> dict[str, object]:
    """Accuracies per attribute on held-out captions, with everything needed to repeat the measurement.

    Of several `guidances` the best is chosen first. If that is not the usual one, both are measured.
    """
    pipeline.set_progress_bar_config(disable=True)
    tried: dict[str, dict[str, float]] = {}
    if len(guidances) > 1:
        for guidance in guidances:
            tried[str(guidance)] = {
                kind: _accuracy(pipeline, n, objects, CHOICE_CAPTION_SEED, guidance, seed)["all"]
                for kind, objects, n in (("single", 1, CHOICE_SINGLES), ("pair", 2, CHOICE_PAIRS))
            }
            logger.info("guidance %s: %s", guidance, tried[str(guidance)])
    # Of equals the one closest to the usual.
    best = max(guidances, key=lambda g: (sum(tried.get(str(g), {}).values()), -abs(g - USUAL_GUIDANCE)))
    result: dict[str, object] = {
        "steps": STEPS,
        "guidance": best,
        "noise_seed": seed,
        "caption_seed": CAPTION_SEED,
        **_measured(pipeline, best, seed),
    }
    if best != USUAL_GUIDANCE and USUAL_GUIDANCE in guidances:
        result[f"guidance {USUAL_GUIDANCE}"] = _measured(pipeline, USUAL_GUIDANCE, seed)
    return result | {
        "guidance_tried": {
            "caption_seed": CHOICE_CAPTION_SEED,
            "single_captions": CHOICE_SINGLES,
            "pair_captions": CHOICE_PAIRS,
            "all_attributes_right": tried,
        },
        "reader": measure_reader(AttributeReader.load(), pipeline.vae.to("cpu"), n=512, seed=seed),
    }


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


def _measured(pipeline: StableDiffusionPipeline, guidance: float, seed: int) -> dict[str, object]:
    return {
        kind: {"captions": n, "accuracy": _accuracy(pipeline, n, objects, CAPTION_SEED, guidance, seed)}
        for kind, objects, n in (("single", 1, SINGLES), ("pair", 2, PAIRS))
    }


def _accuracy(
    pipeline: StableDiffusionPipeline, n: int, objects: int, caption_seed: int, guidance: float, seed: int
) -> dict[str, float]:
    captions = held_out_captions(n, caption_seed, objects)
    images = generate(pipeline, captions, steps=STEPS, guidance=guidance, seed=seed)
    score = AttributeReader.load().score(images, captions)
    return {name: round(share, 4) for name, share in score.items()}
