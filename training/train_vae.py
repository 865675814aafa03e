"""Train the autoencoder, which maps 64x64 pixels to 16x16 latents with four channels and back."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training import workers
from training.data import images_of, random_scenes

logger = logging.getLogger(__name__)

KL_WEIGHT = 2e-4


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
        # `StableDiffusion3Pipeline` adds it to the latents.
        shift_factor=0.0,
    )


def train_vae(
    out: Path,
    *,
    minutes: float,
    device: str,
    seed: int,
    batch: int,
    start_from: Path | None = None,
    decoder_only: bool = False,
) -> None:
    """Train for `minutes` and save to `out`, with latents normalised to mean 0 and standard deviation 1.

    Continue from the autoencoder in `start_from`, if given. With `decoder_only`, the latents do not change, so that a
    denoiser trained on them remains valid.
    """
    rank = workers.start(device)
    torch.manual_seed(seed)
    vae = new_vae() if start_from is None else AutoencoderKL.from_pretrained(start_from)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    trained = list(vae.parameters())
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    rng = np.random.default_rng([seed, rank])
    torch.manual_seed(seed * 1000 + rank)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = workers.same_for_all(min((time.monotonic() - start) / (60 * minutes), 1.0), device)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 - done))
        images = images_of(random_scenes(rng, batch, 0.4), rng).to(device, memory_format=torch.channels_last)
        loss, error = _loss(vae, images, frozen_encoder=decoder_only)
        optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if rank == 0 and step % 50 == 0:
            logger.info("vae %3.0f%% step %d loss %.4f psnr %.2f", 100 * done, step, loss, -10 * np.log10(error / 4))
    if rank == 0:
        vae.eval()
        if not decoder_only:
            _normalise_latents(vae, images_of(random_scenes(rng, 1024, 0.4), rng).to(device))
        vae.save_pretrained(out)
        logger.info("vae trained: %d steps of %d x %d images", step, workers.world_size(), batch)


def _loss(vae: AutoencoderKL, images: torch.Tensor, frozen_encoder: bool) -> tuple[torch.Tensor, float]:
    with torch.set_grad_enabled(not frozen_encoder):
        posterior = vae.encode(images).latent_dist
        latents = posterior.mode() if frozen_encoder else posterior.sample()
    if frozen_encoder:
        # Add noise, because the UNet's latents are never exactly those of the encoder.
        latents = latents + 0.12 * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
    decoded = vae.decode(latents).sample
    difference = decoded - images
    # Also compare differences between neighbouring pixels, because outlines are few pixels but determine the shape.
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    squared = difference.square().mean()
    loss = difference.abs().mean() + 2 * squared + edges
    if not frozen_encoder:
        loss = loss + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
    return loss, float(squared.detach())


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold mean and standard deviation of each latent channel into the 1x1 convolutions around the latents.

    The pipeline has a single scaling factor for all channels, which can then be 1.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / deviation
    vae.quant_conv.bias[channels:] -= 2 * deviation.log()
    # post(deviation * z + mean) = (post.weight * deviation) z + post.weight mean + bias
    weight = vae.post_quant_conv.weight  # [channels, channels, 1, 1]
    vae.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= deviation.view(1, -1, 1, 1)
