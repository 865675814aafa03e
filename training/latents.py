"""A data set held in memory: latents and captions, encoded once before the denoiser is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from training.data import images_of, random_captions, random_scenes
from training.train_text import tokenize


@dataclass(frozen=True)
class EncodedText:
    """What a denoiser may be told about captions."""

    hidden: torch.Tensor  # [captions, tokens, width]
    pooled: torch.Tensor  # [captions, width], the hidden state at the token that ends the caption
    mask: torch.Tensor  # [captions, tokens], false at the padding

    def __getitem__(self, which: torch.Tensor) -> EncodedText:
        return EncodedText(self.hidden[which], self.pooled[which], self.mask[which])


@dataclass(frozen=True)
class LatentData:
    """Latents with, for each, the row of its caption in `text`; row 0 is the empty caption."""

    latents: torch.Tensor  # [images, 4, 16, 16]
    caption: torch.Tensor  # [images]
    text: EncodedText


@torch.no_grad()
def encode_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], device: str) -> EncodedText:
    hidden, pooled, masks = [], [], []
    for at in range(0, len(captions), 256):
        ids = tokenize(tokenizer, captions[at : at + 256]).to(device)
        out = encoder(ids)
        hidden.append(out.last_hidden_state)
        pooled.append(out.pooler_output)
        # The padding is the end mark repeated: real tokens are those up to the first end mark.
        masks.append((ids == tokenizer.eos_token_id).cumsum(1) <= 1)
    return EncodedText(torch.cat(hidden), torch.cat(pooled), torch.cat(masks))


@torch.no_grad()
def make_latent_data(
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    images: int,
    pair_share: float,
    device: str,
    rng: np.random.Generator,
) -> LatentData:
    """Renders, encodes and forgets `images` pictures, in the memory format the device likes."""
    latents, captions = [], []
    for at in range(0, images, 64):
        scenes = random_scenes(rng, min(64, images - at), pair_share)
        pixels = images_of(scenes, rng).to(device, memory_format=torch.channels_last)
        latents.append(vae.encode(pixels).latent_dist.mode())
        captions += random_captions(scenes, rng)
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
    text = encode_text(encoder, tokenizer, list(rows), device)
    return LatentData(torch.cat(latents), torch.tensor([rows[c] for c in captions], device=device), text)
