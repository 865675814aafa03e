"""A tiny Stable Diffusion checkpoint in the original layout, as distributed in a single file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Parts of diffusers' names and their originals, in a residual block and a VAE's attention.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
#: The same for the UNet, whose blocks all have one layer.
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
}  # fmt: skip


def save_single_file(pipe: Any, path: Path) -> None:
    """Write `pipe`, `stable_diffusion(layout="small")`, to one .safetensors file."""
    tensors = {f"model.diffusion_model.{_unet(name)}": value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        is_projection = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", name) is not None
        tensors[f"first_stage_model.{_vae(name, len(pipe.vae.config.block_out_channels))}"] = (
            value[:, :, None, None] if is_projection else value
        )
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + name.removeprefix("text_model."): v for name, v in pipe.text_encoder.state_dict().items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def _unet(name: str) -> str:
    place = next(each for each in sorted(_UNET, key=len, reverse=True) if name.startswith(f"{each}."))
    rest = name.removeprefix(f"{place}.")
    if "resnets" in place:
        part, _, last = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{last}"
    return f"{_UNET[place]}.{rest}"


def _vae(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        before, after = name.split("mid_block.attentions.0.")
        part, _, last = after.rpartition(".")
        name = f"{before}mid.attn_1.{_VAE_ATTENTION[part]}.{last}"
    return name


def same_weights(one: Any, other: Any) -> bool:
    """Whether two pipelines have the same modules' weights."""
    return all(
        torch.equal(value, getattr(other, component).state_dict()[name])
        for component in ("unet", "vae", "text_encoder")
        for name, value in getattr(one, component).state_dict().items()
    )
