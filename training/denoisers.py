"""The denoisers that can be trained on this data, and how to build and call them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import text_encoders
from training.objectives import (
    Batch,
    Learner,
    Predict,
    consistency_loss,
    flow_loss,
    guidance_embedding,
    noise_loss,
    noise_schedule,
    scales,
)
from training.text_encoders import Encode, EncodedText
from training.train_text import WIDTH

LATENT_SIZE = 16


@dataclass(frozen=True)
class Family:
    """How to build, call and train a denoiser, and which text encoder it uses."""

    build: Callable[[], torch.nn.Module]
    predict: Predict
    loss: Callable[[Learner, Batch], torch.Tensor] = noise_loss
    encoder: Callable[[Path, str], Encode] = text_encoders.clip
    # Whether the family has its own text encoder instead of the embedded pipeline's.
    own_text: bool = False
    # Whether to train with `torch.compile`, which helps if there are many small operations.
    compiled: bool = False


def _unet(**changes: Any) -> torch.nn.Module:
    settings: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        # Cross-attention at every resolution, because the model does not learn shapes without it at 16x16.
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": WIDTH,
        # This is the number of heads, despite its name. More and narrower heads are slower on a CPU.
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 8,
    }
    model: torch.nn.Module = UNet2DConditionModel(**(settings | changes))
    return model


def _sd_predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    out: torch.Tensor = model(noisy, timesteps, encoder_hidden_states=text.hidden, return_dict=False)[0]
    return out


def _sdxl() -> torch.nn.Module:
    # As in SDXL, the down blocks have no, one and more transformer layers, and the pooled text has the whole scene.
    return _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
        use_linear_projection=True,
    )


def _sdxl_predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    # Original size, crop and target size are the same for all images of this data.
    size = [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]
    time_ids = torch.tensor(size, device=noisy.device).expand(len(noisy), -1)
    out: torch.Tensor = model(
        noisy,
        timesteps,
        encoder_hidden_states=text.hidden,
        added_cond_kwargs={"text_embeds": text.pooled, "time_ids": time_ids},
        return_dict=False,
    )[0]
    return out


def _pixart() -> torch.nn.Module:
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        cross_attention_dim=128,
        caption_channels=WIDTH,
        sample_size=LATENT_SIZE,
        patch_size=2,
        use_additional_conditions=False,
    )
    # Initialized as by the authors: every block passes its input on, and the prediction is zero.
    torch.nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    torch.nn.init.zeros_(model.adaln_single.linear.bias)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    made: torch.nn.Module = model
    return made


def _pixart_predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    out: torch.Tensor = model(
        noisy,
        encoder_hidden_states=text.hidden,
        encoder_attention_mask=text.mask.to(noisy.dtype),
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return out


def _sd3() -> torch.nn.Module:
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=2 * WIDTH,  # of two text encoders
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    # At first, every block passes its input on, and the prediction is zero.
    norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*(norm.linear for norm in norms), model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    made: torch.nn.Module = model
    return made


def _sd3_predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    # Flow matching is the same task at another scale (see `flow_loss`); its time is a fraction.
    signal, spread = scales(_alphas().to(noisy.device), timesteps)
    total = signal + spread
    # The backward pass of the fused attention is slow on a CPU.
    attention = sdpa_kernel(SDPBackend.MATH) if model.training else nullcontext()
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=model.training), attention:
        velocity = model(
            noisy / total,
            encoder_hidden_states=text.hidden,
            pooled_projections=text.pooled,
            timestep=1000 * (spread / total).flatten(),
            return_dict=False,
        )[0]
    v: torch.Tensor = (velocity.float() - (spread - signal) * noisy) / total
    return v


@functools.cache
def _alphas() -> torch.Tensor:
    alphas: torch.Tensor = noise_schedule().alphas_cumprod
    return alphas


_GUIDANCE_WIDTH = 64


def _lcm_predict(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: EncodedText,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    assert guidance is not None
    out: torch.Tensor = model(
        noisy,
        timesteps,
        timestep_cond=guidance_embedding(guidance, _GUIDANCE_WIDTH),
        encoder_hidden_states=text.hidden,
        return_dict=False,
    )[0]
    return out


FAMILIES: dict[str, Family] = {
    "sd": Family(_unet, _sd_predict),
    "sdxl": Family(_sdxl, _sdxl_predict, encoder=text_encoders.clip_with_projection, own_text=True),
    "pixart": Family(_pixart, _pixart_predict, encoder=text_encoders.t5, own_text=True),
    "sd3": Family(_sd3, _sd3_predict, flow_loss, text_encoders.twice_with_projection, compiled=True),
    "lcm": Family(lambda: _unet(time_cond_proj_dim=_GUIDANCE_WIDTH), _lcm_predict, loss=consistency_loss),
}

# Layers that the embedded UNet does not have. With zero weights, they have no effect initially.
_SILENT = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.net.2.", "add_embedding.linear_2.", "time_embedding.cond_proj.")


def carry_over(model: torch.nn.Module, embedded: dict[str, torch.Tensor]) -> None:
    """Copy the weights of the embedded UNet to the layers of `model` that it also has; set the others to zero."""
    for name, value in model.state_dict().items():
        if name in embedded and embedded[name].numel() == value.numel():
            value.copy_(embedded[name].reshape(value.shape))  # a 1x1 convolution or a linear layer
        elif any(part in name for part in _SILENT):
            value.zero_()
