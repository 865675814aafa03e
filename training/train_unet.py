"""Trains a denoiser on captioned latents: v-prediction, caption dropout, an average of the weights."""

from __future__ import annotations

import logging
import math
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from training import workers
from training.denoisers import FAMILIES
from training.latents import LatentData, make_latent_data
from training.unet_training import LATEST, UNetTraining

logger = logging.getLogger(__name__)


def train_unet(parts: Path, out: Path, config: UNetTraining, *, device: str) -> None:
    """Trains on the text encoder and autoencoder found in `parts`; goes on from `out` if it has a checkpoint.

    The learning rate falls to zero over `minutes` of wall-clock time, all runs together. Every minute a
    checkpoint is written to `out`, every ten minutes one that is kept.
    """
    rank = workers.start(device, pid_folder=out)
    family = FAMILIES[config.family]
    torch.manual_seed(config.seed)
    model = family.build().to(device).train()
    # Twice as fast for the convolutions of a CPU.
    torch.nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(model).requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    step, before = 0, 0.0  # seconds of earlier runs
    if (out / LATEST).exists():
        state = torch.load(out / LATEST, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]

    data = _data(parts, config, device, np.random.default_rng([config.seed, rank, step]))
    torch.manual_seed(config.seed * 1000 + rank + step)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    alphas = scheduler.alphas_cumprod.to(device)
    start, saved, loss_mean, done = time.monotonic(), time.monotonic(), 1.0, 0.0
    while done < 1:
        elapsed = workers.same_for_all(before + time.monotonic() - start, device)
        done = min(elapsed / (60 * config.minutes), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 100) * _decay(done)
        which = torch.randint(len(data.latents), (config.batch,), device=device)
        clean, caption = data.latents[which], data.caption[which]
        caption = caption * (torch.rand(config.batch, device=device) >= config.caption_dropout)  # row 0 is empty
        timesteps = _timesteps(config.batch, device)
        noise = torch.randn_like(clean)
        signal, spread = (x.view(-1, 1, 1, 1) for x in (alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt()))
        prediction = family.predict(model, signal * clean + spread * noise, timesteps, data.text[caption])
        loss = torch.nn.functional.mse_loss(prediction, signal * noise - spread * clean)
        optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*average.parameters()], [*parameters], 1 - decay)
        loss_mean = 0.98 * loss_mean + 0.02 * float(loss.detach())
        if rank == 0 and step % 50 == 0:
            samples = step * config.batch * workers.world_size()
            logger.info("%5.1f min step %d samples %d loss %.4f", elapsed / 60, step, samples, loss_mean)
        if rank == 0 and (time.monotonic() - saved > 60 or done == 1):
            saved = time.monotonic()
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "samples": step * config.batch * workers.world_size(),
                "seconds": elapsed,
                "config": asdict(config),
            }
            _save(state, out / LATEST)
            if int(elapsed / 600) > int((elapsed - 70) / 600):
                _save(state, out / f"minute{int(elapsed / 60):03d}.pt")


def _decay(done: float) -> float:
    """Constant for the first half, then down to zero along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1)))


def _timesteps(n: int, device: str) -> torch.Tensor:
    """All noise levels, the middle ones more often: there the shape is decided."""
    uniform = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device) + 0.3)
    chosen = torch.where(torch.rand(n, device=device) < 0.5, uniform, middle)
    return (chosen * 1000).long().clamp(0, 999)


def _data(parts: Path, config: UNetTraining, device: str, rng: np.random.Generator) -> LatentData:
    vae = AutoencoderKL.from_pretrained(parts / "vae").to(device, memory_format=torch.channels_last).eval()
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    data = make_latent_data(
        vae, encoder, tokenizer, images=config.images, pair_share=config.pair_share, device=device, rng=rng
    )
    logger.info("encoded %d images, %d captions", len(data.latents), len(data.text.pooled))
    return data


def _save(state: dict[str, object], path: Path) -> None:
    # First under another name, so that whoever reads never sees half a file.
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)
