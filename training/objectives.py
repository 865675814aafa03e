"""What a denoiser is asked for: the noise that was added, or where its teacher's path ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from training.text_encoders import EncodedText

# The denoiser's prediction of v: (model, noisy, timesteps, text, guidance) -> [batch, 4, 16, 16].
Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, EncodedText, torch.Tensor | None], torch.Tensor]

# From this noise level on the teacher is asked. Below it the noise itself says nearly the same, for nothing.
TAUGHT_FROM = 400

# Latent consistency: the steps of the solver, the guidance scales, and where the loss turns from square to absolute.
SOLVER_STEPS = 25
GUIDANCE_FROM, GUIDANCE_TO = 2.0, 8.0
HUBER = 0.03
# Of `LCMScheduler`: its constants `sigma_data` and `timestep_scaling`.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True)
class Learner:
    """A denoiser, the average of its weights, and the embedded UNet as its teacher, if it has one."""

    model: torch.nn.Module
    average: torch.nn.Module
    predict: Predict
    teacher: torch.nn.Module | None
    teacher_predict: Predict
    alphas: torch.Tensor  # [1000], the share of the signal's variance


@dataclass(frozen=True)
class Batch:
    clean: torch.Tensor  # [batch, 4, 16, 16]
    text: EncodedText
    teacher_text: EncodedText
    no_text: EncodedText  # the empty caption, as the teacher is told it


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def noise_loss(learner: Learner, batch: Batch) -> torch.Tensor:
    """The square error of v. Where there is much noise, of the teacher's v: it is the mean of many answers."""
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
    """Latent consistency distillation, algorithm 1 of arXiv 2310.04378.

    One guided DDIM step of the teacher leads from a noise level to the next of `SOLVER_STEPS`; from both ends
    of it the learner has to arrive at the same image. Guidance as in `StableDiffusionPipeline`, one less in
    the embedding, as in `LatentConsistencyModelPipeline`.
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
    said = _end_of_path(learner, learner.model, noisy, timesteps, batch.text, guidance)
    return ((said - target).square() + HUBER**2).sqrt().mean() - HUBER


def _end_of_path(
    learner: Learner,
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """The image a path leads to, as `LCMScheduler.step` computes it: at timestep 0 it is the input."""
    v = learner.predict(model, noisy, timesteps, text, guidance)
    signal, spread = _scales(learner.alphas, timesteps)
    scaled = (TIMESTEP_SCALING * timesteps).view(-1, 1, 1, 1)
    share = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return share * noisy + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * (signal * noisy - spread * v)


def guidance_embedding(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """As `LatentConsistencyModelPipeline.get_guidance_scale_embedding` makes it, [batch, width]."""
    frequencies = torch.exp(torch.arange(width // 2, device=guidance.device) * -math.log(10000.0) / (width // 2 - 1))
    angles = 1000.0 * (guidance[:, None] - 1.0) * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _scales(alphas: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of signal and noise, [batch, 1, 1, 1] each."""
    share = alphas[timesteps].view(-1, 1, 1, 1)
    return share.sqrt(), (1 - share).sqrt()


def _timesteps(n: int, device: torch.device) -> torch.Tensor:
    """All noise levels, the middle ones more often: there the shape is decided."""
    uniform = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device) + 0.3)
    chosen = torch.where(torch.rand(n, device=device) < 0.5, uniform, middle)
    return (chosen * 1000).long().clamp(0, 999)
