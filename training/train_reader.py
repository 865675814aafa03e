"""Train the attribute reader on rendered, disturbed and reconstructed images."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tgate_compile._demo.attribute_reader import HEADS, AttributeReader, targets_of
from tgate_compile._demo.captions import SIZES, Scene, SceneObject, caption_of, random_scene
from training import workers
from training.data import images_of

logger = logging.getLogger(__name__)

_NOT_APPLICABLE = -100  # ignored by cross_entropy


def train_reader(vae_folder: Path, out: Path, *, steps: int, device: str, seed: int, batch: int) -> None:
    """Train for `steps` and save the weights to the file `out` in half precision."""
    workers.start(device)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL.from_pretrained(vae_folder).to(device, memory_format=torch.channels_last).eval()
    reader = AttributeReader().to(device).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        scenes = any_scenes(rng, batch)
        pixels = (images_of(scenes, rng).to(device) + 1) / 2
        part = batch // 5  # only a part, because the autoencoder is slower than the reader itself
        pixels[:part] = reconstruct(vae, pixels[:part], rng.uniform(0, 0.25))
        scores = reader(_disturb(pixels, rng).contiguous(memory_format=torch.channels_last))
        targets = [targets_of(scene) for scene in scenes]
        loss = torch.zeros((), device=device)
        for name in HEADS:
            target = torch.tensor([t.get(name, _NOT_APPLICABLE) for t in targets], device=device)
            if (target != _NOT_APPLICABLE).any():
                loss = loss + torch.nn.functional.cross_entropy(scores[name], target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("reader step %d loss %.4f", step, loss)
    save_file({name: value.half().contiguous() for name, value in reader.state_dict().items()}, out)


def measure_reader(reader: AttributeReader, vae: AutoencoderKL, *, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the accuracy of the reader on held-out scenes, drawn and reconstructed by the autoencoder."""
    results: dict[str, dict[str, float]] = {}
    for objects, kind in ((1, "single"), (2, "pair")):
        rng = np.random.default_rng([seed, objects])
        scenes = [random_scene(rng, objects, held_out=True) for _ in range(n)]
        captions = [caption_of(scene) for scene in scenes]
        drawn = (images_of(scenes, rng) + 1) / 2
        again = torch.cat([reconstruct(vae, part, 0.0) for part in drawn.split(64)])
        for what, pixels in (("drawn", drawn), ("reconstructed", again)):
            score = reader.score(pixels, captions)
            results[f"{kind}, {what}"] = {name: round(share, 4) for name, share in score.items()}
    return results


def any_scenes(rng: np.random.Generator, n: int) -> list[Scene]:
    """Return scenes of both splits with all sizes named. The reader does not need the split, which tests denoisers."""
    scenes = []
    for _ in range(n):
        scene = random_scene(rng, 1 + int(rng.random() < 0.5), held_out=bool(rng.random() < 0.12))
        if len(scene.objects) == 1 and scene.objects[0].size is None:
            item = scene.objects[0]
            sized = SceneObject(item.shape, item.colour, SIZES[rng.integers(2)])
            scene = Scene((sized,), scene.background, scene.position)
        scenes.append(scene)
    return scenes


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: torch.Tensor, latent_noise: float) -> torch.Tensor:
    """Return pixels in [0, 1] after encoding, adding noise to the latents, and decoding."""
    latents = vae.encode((2 * pixels - 1).contiguous(memory_format=torch.channels_last)).latent_dist.mode()
    latents = latents + latent_noise * torch.randn_like(latents)
    decoded: torch.Tensor = vae.decode(latents).sample
    return ((decoded + 1) / 2).clamp(0, 1)


def _disturb(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return the images with slight blur, noise and brightness shift, of random strength for each image."""
    strength = torch.rand(3, len(pixels), 1, 1, 1, device=pixels.device)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = torch.lerp(pixels, blurred, strength[0])
    pixels = pixels + 0.06 * strength[1] * torch.randn_like(pixels) + 0.08 * (strength[2] - 0.5)
    return pixels.clamp(0, 1)
