"""The training objectives of denoisers: predict the noise, the velocity, or the end of the teacher's trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler

from training.text_encoders import EncodedText

# Returns a denoiser's prediction of v: (model, noisy, timesteps, text, guidance) -> [batch, 4, 16, 16].
Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, EncodedText, torch.Tensor | None], torch.Tensor]

# The teacher is used from this noise level on. Below it, the noise itself is nearly the same target at no cost.
TAUGHT_FROM = 400

# Flow matching: the fraction of captions whose pooled text is zeroed. It describes the whole scene, and the model would
# otherwise learn to ignore the text tokens.
POOLED_DROPOUT = 0.5

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
    return _errors(learner, batch, _timesteps(len(batch.clean), batch.clean.device)).square().mean()


def flow_loss(learner: Learner, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of the velocity, noise minus image, which flow matching predicts.

    At time t the latents are (1 - t) * image + t * noise. These are the latents of the noise schedule, divided by the
    sum of its scales, and the errors of the velocity are those of v, multiplied by the sum. So the teacher is the same
    as in `noise_loss`; only the weights and the distribution of the noise levels differ.
    """
    n, device = len(batch.clean), batch.clean.device
    kept = torch.rand(n, 1, device=device) >= POOLED_DROPOUT
    batch = replace(batch, text=replace(batch.text, pooled=batch.text.pooled * kept))
    signal, spread = learner.alphas.sqrt(), (1 - learner.alphas).sqrt()
    uniform, middle = torch.rand(n, device=device), torch.sigmoid(torch.randn(n, device=device) + 0.2)
    times = torch.where(torch.rand(n, device=device) < 0.25, uniform, middle)
    timesteps = torch.searchsorted(spread / (signal + spread), times).clamp(max=len(signal) - 1)
    return ((signal + spread)[timesteps].view(-1, 1, 1, 1) * _errors(learner, batch, timesteps)).square().mean()


def _errors(learner: Learner, batch: Batch, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the errors of v, [batch, 4, 16, 16], from the teacher's v at high noise levels."""
    clean, noise = batch.clean, torch.randn_like(batch.clean)
    signal, spread = scales(learner.alphas, timesteps)
    noisy, target = signal * clean + spread * noise, signal * noise - spread * clean
    if learner.teacher is not None:
        taught = (timesteps >= TAUGHT_FROM).nonzero()[:, 0]
        with torch.no_grad():
            target[taught] = learner.teacher_predict(
                learner.teacher, noisy[taught], timesteps[taught], batch.teacher_text[taught], None
            )
    return learner.predict(learner.model, noisy, timesteps, batch.text, None) - target


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
    signal, spread = scales(learner.alphas, timesteps)
    noisy = signal * batch.clean + spread * torch.randn_like(batch.clean)
    guidance = GUIDANCE_FROM + (GUIDANCE_TO - GUIDANCE_FROM) * torch.rand(n, device=device)

    with torch.no_grad():
        with_text = learner.teacher_predict(learner.teacher, noisy, timesteps, batch.teacher_text, None)
        without = learner.teacher_predict(learner.teacher, noisy, timesteps, batch.no_text, None)
        v = without + guidance.view(-1, 1, 1, 1) * (with_text - without)
        signal_then, spread_then = scales(learner.alphas, earlier)
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
    signal, spread = scales(learner.alphas, timesteps)
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


def scales(alphas: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of signal and noise, [batch, 1, 1, 1] each."""
    share = alphas[timesteps].view(-1, 1, 1, 1)
    return share.sqrt(), (1 - share).sqrt()


def _timesteps(n: int, device: torch.device) -> torch.Tensor:
    """Draw timesteps, more often from the middle, where the shapes are determined."""
    uniform = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device) + 0.3)
    chosen = torch.where(torch.rand(n, device=device) < 0.5, uniform, middle)
    return (chosen * 1000).long().clamp(0, 999)
