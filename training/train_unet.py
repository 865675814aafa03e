"""Train a denoiser on captioned latents, with its family's loss, caption dropout, and averaged weights."""

from __future__ import annotations

import logging
import math
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from training import workers
from training.denoisers import FAMILIES, carry_over
from training.latents import LatentData, make_latent_data
from training.objectives import Batch, Learner, noise_schedule
from training.unet_training import LATEST, UNetTraining

logger = logging.getLogger(__name__)


def train_unet(parts: Path, embedded: Path, out: Path, config: UNetTraining, *, device: str) -> None:
    """Train with the text encoder and autoencoder in `parts`; continue from the checkpoint in `out` if there is one.

    Families other than `sd` use parts of the pipeline in `embedded`: the autoencoder, the UNet as a teacher, and the
    UNet's weights, as far as they fit, as initial weights.

    The learning rate decreases to zero over the configured minutes of processor time, counted over all runs, so a
    worker that is suspended for a while loses nothing. A checkpoint is written to `out` every minute, and a permanent
    one every ten minutes.
    """
    rank = workers.start(device, pid_folder=out)
    family = FAMILIES[config.family]
    torch.manual_seed(config.seed)
    model = family.build().to(device).train()
    teacher = None
    if config.family != "sd":
        teacher = (
            UNet2DConditionModel.from_pretrained(embedded / "unet").float().to(device).eval().requires_grad_(False)
        )
        torch.nn.Module.to(teacher, memory_format=torch.channels_last)
        if isinstance(model, UNet2DConditionModel):
            carry_over(model, teacher.state_dict())
    # Convolutions are twice as fast with this format on a CPU.
    torch.nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(model).requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    step, samples, before = 0, 0, 0.0  # seconds of earlier runs
    if (out / LATEST).exists():
        state = torch.load(out / LATEST, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, samples, before = state["step"], state["samples"], state["seconds"]

    if family.compiled:
        model.compile()
    shared = parts if teacher is None else embedded
    # The embedded autoencoder never changes, so its latents are cached for the other families and the next run.
    kept = f"latents_{config.images}_{config.pair_share}_{config.seed}_{rank}.pt"
    cache = None if teacher is None else parts / kept
    data = _data(shared, cache, config, device, np.random.default_rng([config.seed, rank, 0 if cache else step]))
    text = family.encoder(parts / config.family if family.own_text else shared, device)(data.captions)
    teachers = FAMILIES["sd"].encoder
    teacher_text = text if family.encoder is teachers else teachers(shared, device)(data.captions)
    nobody = torch.zeros(config.batch, dtype=torch.long, device=device)
    torch.manual_seed(config.seed * 1000 + rank + step)
    alphas = noise_schedule().alphas_cumprod.to(device)
    learner = Learner(model, average, family.predict, teacher, FAMILIES["sd"].predict, alphas)
    start, saved, loss_mean, done = time.process_time(), time.process_time(), 1.0, 0.0
    while done < 1:
        elapsed = workers.same_for_all(before + time.process_time() - start, device)
        done = min(elapsed / (60 * config.minutes), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 100) * _decay(done)
        which = torch.randint(len(data.latents), (config.batch,), device=device)
        caption = data.caption[which]
        caption = caption * (torch.rand(config.batch, device=device) >= config.caption_dropout)  # row 0 is empty
        batch = Batch(data.latents[which], text[caption], teacher_text[caption], teacher_text[nobody])
        loss = family.loss(learner, batch)
        optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        samples += config.batch * workers.world_size()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*average.parameters()], [*parameters], 1 - decay)
        loss_mean = 0.98 * loss_mean + 0.02 * float(loss.detach())
        if rank == 0 and step % 50 == 0:
            logger.info("%5.1f min step %d samples %d loss %.4f", elapsed / 60, step, samples, loss_mean)
        if rank == 0 and (time.process_time() - saved > 60 or done == 1):
            saved = time.process_time()
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "samples": samples,
                "seconds": elapsed,
                "config": asdict(config),
            }
            _save(state, out / LATEST)
            if int(elapsed / 600) > int((elapsed - 70) / 600):
                _save(state, out / f"minute{int(elapsed / 60):03d}.pt")


def _decay(done: float) -> float:
    """Return the factor of the learning rate: constant for the first half, then a cosine decay to zero."""
    return 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1)))


def _data(folder: Path, cache: Path | None, config: UNetTraining, device: str, rng: np.random.Generator) -> LatentData:
    if cache is not None and cache.exists():
        return LatentData(**torch.load(cache, map_location=device, weights_only=True))
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device, memory_format=torch.channels_last).eval()
    data = make_latent_data(vae, images=config.images, pair_share=config.pair_share, device=device, rng=rng)
    logger.info("encoded %d images, %d captions", len(data.latents), len(data.captions))
    if cache is not None:
        _save(vars(data), cache)
    return data


def _save(state: dict[str, object], path: Path) -> None:
    # Write to another name first, so that readers never see a partial file.
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)
