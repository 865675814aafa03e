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
CHOICE_SINGLES, CHOICE_PAIRS = 96, 48
CHOICE_CAPTION_SEED = 2025
_BATCH = 32


def evaluate(
    pipeline: StableDiffusionPipeline, guidances: Sequence[float], *, seed: int
) -> dict[str, object]:
    """Accuracies per attribute on held-out captions, with everything needed to repeat the measurement.

    With several `guidances` the best for single objects is chosen first.
    """
    pipeline.set_progress_bar_config(disable=True)
    best, tried = guidances[0], {}
    if len(guidances) > 1:
        for guidance in guidances:
            single = _accuracy(pipeline, CHOICE_SINGLES, 1, CHOICE_CAPTION_SEED, guidance, seed)["all"]
            pair = _accuracy(pipeline, CHOICE_PAIRS, 2, CHOICE_CAPTION_SEED, guidance, seed)["all"]
            tried[str(guidance)] = {"single": single, "pair": pair}
            logger.info("guidance %s: %s", guidance, tried[str(guidance)])
        best = max(
            guidances, key=lambda guidance: (tried[str(guidance)]["single"], tried[str(guidance)]["pair"])
        )
    return {
        "steps": STEPS,
        "guidance": best,
        "noise_seed": seed,
        "caption_seed": CAPTION_SEED,
        "single": {
            "captions": SINGLES,
            "accuracy": _accuracy(pipeline, SINGLES, 1, CAPTION_SEED, best, seed),
        },
        "pair": {"captions": PAIRS, "accuracy": _accuracy(pipeline, PAIRS, 2, CAPTION_SEED, best, seed)},
        "guidance_tried": {
            "caption_seed": CHOICE_CAPTION_SEED,
            "single_captions": CHOICE_SINGLES,
            "pair_captions": CHOICE_PAIRS,
            "all_attributes_right": tried,
        },
        "reader": measure_reader(AttributeReader.load(), pipeline.vae, n=512, seed=seed),
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


def _accuracy(
    pipeline: StableDiffusionPipeline, n: int, objects: int, caption_seed: int, guidance: float, seed: int
) -> dict[str, float]:
    captions = held_out_captions(n, caption_seed, objects)
    images = generate(pipeline, captions, steps=STEPS, guidance=guidance, seed=seed)
    score = AttributeReader.load().score(images, captions)
    return {name: round(share, 4) for name, share in score.items()}
