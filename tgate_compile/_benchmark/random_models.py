"""Denoisers of the real models' sizes with random weights: what a step costs does not depend on what they know."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from tgate_compile._cost.graph_cost import PIXELS_PER_LATENT
from tgate_compile._cost.models import MODELS, Architecture
from tgate_compile._errors import ConfigurationError

MSG_NAME = "The models with random weights are {known}, but got {given!r}."

#: Of `MODELS`, those whose pipelines are made here.
NAMES = ("sd15", "sd21", "sdxl", "pixart_alpha")


def random_pipeline(
    name: str, device: torch.device, dtype: torch.dtype, *, size: int | None = None
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline with this denoiser, and the arguments of its call: embeddings for a prompt, latents for an image.

    Args:
        name: one of `NAMES`.
        device: where to.
        dtype: of the weights.
        size: height and width of the image in pixels; None is the model's own.

    Raises:
        ConfigurationError: there is no such model.
    """
    if name not in NAMES:
        raise ConfigurationError(MSG_NAME.format(known=", ".join(NAMES), given=name))
    architecture = MODELS[name].architecture
    size = architecture.size if size is None else size
    latents = size // PIXELS_PER_LATENT
    _, tokens, width = _text_shape(architecture)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        denoiser = architecture.denoiser(**{**architecture.config, "sample_size": latents})
        text = torch.randn(1, tokens, width, dtype=dtype)
        pooled = torch.randn(1, 1280, dtype=dtype)
        mask = torch.ones(1, tokens, dtype=torch.long)
    denoiser = denoiser.to(dtype).eval().requires_grad_(False)
    call: dict[str, Any] = {
        "prompt_embeds": text,
        "negative_prompt_embeds": torch.zeros_like(text),
        "output_type": "latent",
        "height": size,
        "width": size,
    }
    if name == "pixart_alpha":
        call |= {"prompt_attention_mask": mask, "negative_prompt": None, "negative_prompt_attention_mask": mask}
        call |= {"use_resolution_binning": False}
        return PixArtAlphaPipeline(None, None, _vae(), denoiser, DDIMScheduler()), call
    if name == "sdxl":
        call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        return StableDiffusionXLPipeline(_vae(), None, None, None, None, denoiser, DDIMScheduler()), call
    pipe: Any = StableDiffusionPipeline(
        _vae(), None, None, denoiser, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    return pipe, call


def _text_shape(architecture: Architecture) -> tuple[Any, ...]:
    shape = architecture.inputs["encoder_hidden_states"]
    assert isinstance(shape, tuple)
    return shape


def _vae() -> AutoencoderKL:
    # Never run: it only tells the pipeline that latents are eight times smaller than images.
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
