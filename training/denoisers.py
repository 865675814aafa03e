"""The denoisers that can be trained on this data: one row per family, how to build it and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from training.latents import EncodedText
from training.train_text import WIDTH

LATENT_SIZE = 16


@dataclass(frozen=True)
class Family:
    """`predict(model, noisy, timesteps, text)` gives the prediction, [batch, 4, 16, 16]."""

    build: Callable[[], torch.nn.Module]
    predict: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, EncodedText], torch.Tensor]


def _sd() -> torch.nn.Module:
    model: torch.nn.Module = UNet2DConditionModel(**_UNET)
    return model


def _sd_predict(
    model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: EncodedText
) -> torch.Tensor:
    out: torch.Tensor = model(noisy, timesteps, encoder_hidden_states=text.hidden, return_dict=False)[0]
    return out


def _sdxl() -> torch.nn.Module:
    model: torch.nn.Module = UNet2DConditionModel(
        **_UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
        use_linear_projection=True,
    )
    return model


def _sdxl_predict(
    model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: EncodedText
) -> torch.Tensor:
    # Original size, crop and target size: the same for every image of this data.
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
    model: torch.nn.Module = PixArtTransformer2DModel(
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
    return model


def _pixart_predict(
    model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, text: EncodedText
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


_UNET: dict[str, object] = {
    "sample_size": LATENT_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    # Cross-attention at every resolution: without it at 16x16 the shape is not learned.
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": WIDTH,
    # The number of heads, in spite of its name. More, narrower heads are slower on a CPU.
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 8,
}

FAMILIES: dict[str, Family] = {
    "sd": Family(_sd, _sd_predict),
    "sdxl": Family(_sdxl, _sdxl_predict),
    "pixart": Family(_pixart, _pixart_predict),
}
