"""Measure with the attribute reader how well a pipeline follows captions that it was never trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from training.train_reader import measure_reader

logger = logging.getLogger(__name__)

SINGLES, PAIRS = 256, 128
CAPTION_SEED = 2024
# The guidance scale is chosen with different held-out captions than those used for the measurement.
CHOICE_SINGLES, CHOICE_PAIRS = 64, 32
CHOICE_CAPTION_SEED = 2025
_BATCH = 32


@dataclass(frozen=True)
class Sampler:
    """A pipeline, its number of steps, and further arguments of its call."""

    pipeline: Any
    steps: int
    call: Mapping[str, object]


def evaluate(
    pipeline: Any, variant: str, guidances: Sequence[float] | None, *, steps: int | None, seed: int
) -> dict[str, object]:
    """Return accuracies by attribute on held-out captions, with everything needed to repeat the measurement.

    If steps or guidance are None, the variant's own are used. If there are several `guidances`, the best one is chosen
    first. If that is not the variant's own, both are measured.
    """
    pipeline.set_progress_bar_config(disable=True)
    own = DEMO_VARIANTS[variant]
    sampler = Sampler(pipeline, steps or own.steps, own.call)
    guidances = guidances or [own.guidance]
    tried: dict[str, dict[str, float]] = {}
    if len(guidances) > 1:
        for guidance in guidances:
            tried[str(guidance)] = {
                kind: _accuracy(sampler, n, objects, CHOICE_CAPTION_SEED, guidance, seed)["all"]
                for kind, objects, n in (("single", 1, CHOICE_SINGLES), ("pair", 2, CHOICE_PAIRS))
            }
            logger.info("guidance %s: %s", guidance, tried[str(guidance)])
    # In case of a tie, choose the scale closest to the variant's own.
    best = max(guidances, key=lambda g: (sum(tried.get(str(g), {}).values()), -abs(g - own.guidance)))
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    result: dict[str, object] = {
        "variant": variant,
        "pipeline": type(pipeline).__name__,
        "denoiser": type(denoiser).__name__,
        "denoiser_parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "steps": sampler.steps,
        "guidance": best,
        "noise_seed": seed,
        "caption_seed": CAPTION_SEED,
        **_measured(sampler, best, seed),
    }
    if best != own.guidance and own.guidance in guidances:
        result[f"guidance {own.guidance}"] = _measured(sampler, own.guidance, seed)
    if tried:
        result["guidance_tried"] = {
            "caption_seed": CHOICE_CAPTION_SEED,
            "single_captions": CHOICE_SINGLES,
            "pair_captions": CHOICE_PAIRS,
            "all_attributes_right": tried,
        }
    if variant == "sd":  # all variants have the same autoencoder
        result["reader"] = measure_reader(AttributeReader.load(), pipeline.vae.to("cpu"), n=512, seed=seed)
    return result


def training_of(checkpoint: Path) -> dict[str, object]:
    """Return the duration and the configuration of the training of a checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    minutes = round(state["seconds"] / 60, 1)
    return {"steps": state["step"], "samples": state["samples"], "cpu_minutes": minutes, "config": state["config"]}


def generate(sampler: Sampler, captions: Sequence[str], *, guidance: float, seed: int) -> list[Image.Image]:
    """Return one image per caption. Each image has separate noise, so it does not depend on the batch size."""
    images: list[Image.Image] = []
    for at in range(0, len(captions), _BATCH):
        batch = list(captions[at : at + _BATCH])
        noise = [torch.Generator().manual_seed(seed * 1_000_000 + at + i) for i in range(len(batch))]
        images += sampler.pipeline(
            batch, num_inference_steps=sampler.steps, guidance_scale=guidance, generator=noise, **sampler.call
        ).images
    return images


def _measured(sampler: Sampler, guidance: float, seed: int) -> dict[str, object]:
    return {
        kind: {"captions": n, "accuracy": _accuracy(sampler, n, objects, CAPTION_SEED, guidance, seed)}
        for kind, objects, n in (("single", 1, SINGLES), ("pair", 2, PAIRS))
    }


def _accuracy(
    sampler: Sampler, n: int, objects: int, caption_seed: int, guidance: float, seed: int
) -> dict[str, float]:
    captions = held_out_captions(n, caption_seed, objects)
    images = generate(sampler, captions, guidance=guidance, seed=seed)
    score = AttributeReader.load().score(images, captions)
    return {name: round(share, 4) for name, share in score.items()}
