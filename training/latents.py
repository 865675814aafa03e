"""A data set in memory, with captions and latents that are encoded once before the denoiser is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.data import images_of, random_captions, random_scenes


@dataclass(frozen=True)
class LatentData:
    """Latents, and for each the index of its caption in `captions`; index 0 is the empty caption."""

    latents: torch.Tensor  # [images, 4, 16, 16]
    caption: torch.Tensor  # [images]
    captions: list[str]


@torch.no_grad()
def make_latent_data(
    vae: AutoencoderKL, *, images: int, pair_share: float, device: str, rng: np.random.Generator
) -> LatentData:
    """Render `images` pictures and encode them, in batches that are fast and do not need much memory."""
    latents, captions = [], []
    for at in range(0, images, 64):
        scenes = random_scenes(rng, min(64, images - at), pair_share)
        pixels = images_of(scenes, rng).to(device, memory_format=torch.channels_last)
        latents.append(vae.encode(pixels).latent_dist.mode())
        captions += random_captions(scenes, rng)
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
    return LatentData(torch.cat(latents), torch.tensor([rows[c] for c in captions], device=device), list(rows))
