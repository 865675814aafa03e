"""Tiny modular pipelines of diffusers' own blocks, with the components of the ordinary tiny pipelines.

If the ordinary ones omit the text encoder and the VAE, the blocks that need them are omitted, too.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests import tiny_pipelines, tiny_transformers, tiny_video

STEPS = 6


def modular_sdxl(scheduler: Any = None) -> Any:
    """Return SDXL with a UNet of one block, which takes a quarter of the time to capture."""
    source = tiny_pipelines.sdxl(scheduler=scheduler)
    small = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    unet = tiny_pipelines._unet("sdxl", attention_head_dim=4, transformer_layers_per_block=1, **small)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    components = {name: getattr(source, name) for name in names} | {"unet": copy.deepcopy(unet)}
    return with_components(diffusers.StableDiffusionXLAutoBlocks(), components)


def modular_sdxl_call(batch: int = 1) -> dict[str, Any]:
    prompts = {"prompt": tiny_pipelines.PROMPTS[:batch], "negative_prompt": ["dog", "snow"][:batch]}
    return {**prompts, "height": tiny_pipelines.SIZE, "width": tiny_pipelines.SIZE, "output_type": "latent"}


def modular_wan(boundary_ratio: float | None = None) -> Any:
    """Return Wan 2.1, or, with a boundary, the blocks of Wan 2.2."""
    source = tiny_video.wan(boundary_ratio=boundary_ratio)
    components = {"transformer": source.transformer, "scheduler": source.scheduler}
    if boundary_ratio is None:
        return with_components(_denoising(diffusers.WanBlocks()), components)
    pipe = with_components(_denoising(diffusers.Wan22Blocks()), {**components, "transformer_2": source.transformer_2})
    pipe.update_components(boundary_ratio=boundary_ratio)
    return pipe


def modular_wan_call(batch: int = 1) -> dict[str, Any]:
    latents = tiny_transformers.embedded(batch, 4, 2, 4, 4, seed=5)  # without a VAE, the blocks assume 16 channels
    return {**tiny_video.wan_call(batch), "latents": latents}


def modular_ltx() -> Any:
    source = tiny_video.ltx()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return with_components(
        _denoising(diffusers.LTXAutoBlocks()), {"transformer": source.transformer, "scheduler": scheduler}
    )


def with_components(blocks: Any, components: dict[str, Any]) -> Any:
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    silence(pipe._blocks)
    return pipe


def silence(blocks: Any) -> None:
    """Disable progress bars in all blocks of `blocks`."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        silence(block)


def run(pipe: Any, steps: int = STEPS, **call: Any) -> torch.Tensor:
    """Call `pipe` with a seeded generator, and return latents."""
    latents: torch.Tensor = pipe(
        generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output="latents", **call
    )
    return latents


def _denoising(blocks: Any) -> Any:
    for name in ("text_encoder", "decode"):
        del blocks.sub_blocks[name]
    return blocks
