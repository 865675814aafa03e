"""The training objectives of denoisers: predict the added noise, or the end of the teacher's trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from training.text_encoders import EncodedText

# Returns a denoiser's prediction of v: (model, noisy, timesteps, text, guidance) -> [batch, 4, 16, 16].
Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, EncodedText, torch.Tensor | None], torch.Tensor]

# The teacher is used from this noise level on. Below it, the noise itself is nearly the same target at no cost.
TAUGHT_FROM = 400

# Latent consistency: the solver's steps, the range of guidance scales, and where the loss becomes linear.
SOLVER_STEPS = 25
GUIDANCE_FROM, GUIDANCE_TO = 2.0, 8.0
HUBER = 0.03
# The constants `sigma_data` and `timestep_scaling` of `LCMScheduler`.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True)
class Learner:
    """A denoiser, a model with its averaged weights, and the embedded UNet as its teacher, if it has one."""

    model: torch.nn.Module
    average: torch.nn.Module
    predict: Predict
    teacher: torch.nn.Module | None
    teacher_predict: Predict
    alphas: torch.Tensor  # [1000], the signal's fraction of the variance


@dataclass(frozen=True)
class Batch:
    clean: torch.Tensor  # [batch, 4, 16, 16]
    text: EncodedText
    teacher_text: EncodedText
    no_text: EncodedText  # the empty caption, encoded for the teacher


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def noise_loss(learner: Learner, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of v.

    At high noise levels the target is the teacher's v, because the teacher has learned the mean of many targets.
    """
    clean, noise = batch.clean, torch.randn_like(batch.clean)
    timesteps = _timesteps(len(clean), clean.device)
    signal, spread = _scales(learner.alphas, timesteps)
    noisy, target = signal * clean + spread * noise, signal * noise - spread * clean
    if learner.teacher is not None:
        taught = (timesteps >= TAUGHT_FROM).nonzero()[:, 0]
        with torch.no_grad():
            target[taught] = learner.teacher_predict(
                learner.teacher, noisy[taught], timesteps[taught], batch.teacher_text[taught], None
            )
    prediction = learner.predict(learner.model, noisy, timesteps, batch.text, None)
    return torch.nn.functional.mse_loss(prediction, target)


def consistency_loss(learner: Learner, batch: Batch) -> torch.Tensor:
    """Return the loss of latent consistency distillation, algorithm 1 of arXiv 2310.04378.

    One guided DDIM step of the teacher leads from a noise level to the next of `SOLVER_STEPS`, and the learner must
    predict the same image from both ends of the step. The guidance scale is defined as in `StableDiffusionPipeline`; in
    the embedding it is smaller by one, as in `LatentConsistencyModelPipeline`.
    """
    assert learner.teacher is not None
    n, device = len(batch.clean), batch.clean.device
    skip = 1000 // SOLVER_STEPS
    timesteps = (torch.randint(SOLVER_STEPS, (n,), device=device) + 1) * skip - 1
    earlier = (timesteps - skip).clamp(min=0)
    signal, spread = _scales(learner.alphas, timesteps)
    noisy = signal * batch.clean + spread * torch.randn_like(batch.clean)
    guidance = GUIDANCE_FROM + (GUIDANCE_TO - GUIDANCE_FROM) * torch.rand(n, device=device)

    with torch.no_grad():
        with_text = learner.teacher_predict(learner.teacher, noisy, timesteps, batch.teacher_text, None)
        without = learner.teacher_predict(learner.teacher, noisy, timesteps, batch.no_text, None)
        v = without + guidance.view(-1, 1, 1, 1) * (with_text - without)
        signal_then, spread_then = _scales(learner.alphas, earlier)
        stepped = signal_then * (signal * noisy - spread * v) + spread_then * (spread * noisy + signal * v)
        target = _end_of_path(learner, learner.average, stepped, earlier, batch.text, guidance)
    prediction = _end_of_path(learner, learner.model, noisy, timesteps, batch.text, guidance)
    return ((prediction - target).square() + HUBER**2).sqrt().mean() - HUBER


def _end_of_path(
    learner: Learner,
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """Return the predicted image, computed as in `LCMScheduler.step`; at timestep 0 it is the input."""
    v = learner.predict(model, noisy, timesteps, text, guidance)
    signal, spread = _scales(learner.alphas, timesteps)
    scaled = (TIMESTEP_SCALING * timesteps).view(-1, 1, 1, 1)
    share = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return share * noisy + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * (signal * noisy - spread * v)


def guidance_embedding(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """Return the embedding of the guidance scale, [batch, width].

    It is the same as `LatentConsistencyModelPipeline.get_guidance_scale_embedding`.
    """
    frequencies = torch.exp(torch.arange(width // 2, device=guidance.device) * -math.log(10000.0) / (width // 2 - 1))
    angles = 1000.0 * (guidance[:, None] - 1.0) * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _scales(alphas: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of signal and noise, [batch, 1, 1, 1] each."""
    share = alphas[timesteps].view(-1, 1, 1, 1)
    return share.sqrt(), (1 - share).sqrt()


def _timesteps(n: int, device: torch.device) -> torch.Tensor:
    """Draw timesteps, more often from the middle, where the shapes are determined."""
    uniform = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device) + 0.3)
    chosen = torch.where(torch.rand(n, device=device) < 0.5, uniform, middle)
    return (chosen * 1000).long().clamp(0, 999)
