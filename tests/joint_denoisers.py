"""Tiny denoisers with joint attention, of the real diffusers classes with seeded random weights, and calls of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from tests.tiny_pipelines import seeded as seeded_module

TEXT = 6
DIM = 32


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return a denoiser with seeded weights in which the text has a visible effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        module = seeded_module(build)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and re.search(r"to_|add_|attn|norm\d?\.|_mod|modulation", name):
                parameter.mul_(3)
    return module


@dataclass(frozen=True)
class Tiny:
    """A denoiser.

    Attributes:
        build: makes it, always with the same weights.
        call: returns the keyword arguments of a call, for a batch and a step: only the latents and the timestep depend
            on the step.
        image: the number of the image's tokens in a joint attention.
        text: the number of the other tokens.
        first: whether the other tokens come first.
        joint: the number of joint attentions.
    """

    build: Callable[[], torch.nn.Module]
    call: Callable[[int, int], dict[str, Any]]
    image: int
    text: int
    first: bool
    joint: int

    @property
    def text_tokens(self) -> slice:
        return slice(0, self.text) if self.first else slice(self.image, self.image + self.text)


def _time(batch: int, step: int) -> torch.Tensor:
    return torch.full((batch,), 0.9 - 0.2 * step)


def sd3() -> torch.nn.Module:
    """Return SD3.5-medium in small: the first block has a second attention, of the image's tokens alone."""
    return seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            caption_projection_dim=16,
            pooled_projection_dim=DIM,
            out_channels=4,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )


def sd3_call(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 8, 8, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "pooled_projections": random(batch, DIM, seed=51),
        "timestep": 1000 * _time(batch, step),
    }


def flux() -> torch.nn.Module:
    return seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
    )


def _grid(height: int, width: int, axes: int) -> torch.Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.reshape(height * width, axes)


def flux_call(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 16, 4, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "pooled_projections": random(batch, DIM, seed=51),
        "timestep": _time(batch, step),
        "img_ids": _grid(4, 4, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def qwen_image() -> torch.nn.Module:
    return seeded(
        lambda: QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        )
    )


def qwen_image_call(batch: int, step: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "hidden_states": random(batch, 16, 16, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "encoder_hidden_states_mask": mask,
        "timestep": _time(batch, step),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


def flux2() -> torch.nn.Module:
    return seeded(
        lambda: Flux2Transformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


def flux2_call(batch: int, step: int) -> dict[str, Any]:
    text_ids = torch.zeros(batch, TEXT, 4)
    text_ids[..., 3] = torch.arange(TEXT)
    return {
        "hidden_states": random(batch, 16, 8, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "timestep": _time(batch, step),
        "img_ids": _grid(4, 4, 4).expand(batch, -1, -1).clone(),
        "txt_ids": text_ids,
        "guidance": torch.full((batch,), 3.5),
    }


def z_image() -> torch.nn.Module:
    return seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=DIM,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        )
    )


def z_image_call(batch: int, step: int) -> dict[str, Any]:
    """Texts of 6 and 40 tokens, padded to 32 and 64: the second image's text is longer; 25 image tokens become 32."""
    return {
        "x": list(random(batch, 4, 1, 10, 10, seed=step).unbind(0)),
        "t": _time(batch, step),
        "cap_feats": [random(6 if item == 0 else 40, DIM, seed=50 + item) for item in range(batch)],
    }


def aura_flow() -> torch.nn.Module:
    return seeded(
        lambda: AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=64,
        )
    )


def aura_flow_call(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 8, 8, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "timestep": _time(batch, step),
    }


def cogvideox(rotary: bool = True) -> torch.nn.Module:
    return seeded(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=DIM,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=rotary,
        )
    )


def cogvideox_call(batch: int, step: int) -> dict[str, Any]:
    angles = random(32, 16, seed=52)
    return {
        "hidden_states": random(batch, 2, 4, 8, 8, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "timestep": (1000 * _time(batch, step)).long(),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def hunyuan_video() -> torch.nn.Module:
    return seeded(
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            guidance_embeds=True,
            text_embed_dim=DIM,
            pooled_projection_dim=DIM,
            rope_axes_dim=(4, 6, 6),
        )
    )


def hunyuan_video_call(batch: int, step: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "hidden_states": random(batch, 4, 2, 8, 8, seed=step),
        "timestep": (1000 * _time(batch, step)).long(),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "encoder_attention_mask": mask,
        "pooled_projections": random(batch, DIM, seed=51),
        "guidance": torch.full((batch,), 6000.0),
    }


def chroma() -> torch.nn.Module:
    return seeded(
        lambda: ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )


def chroma_call(batch: int, step: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT + 16)
    mask[0, 4:TEXT] = 0
    return {
        "hidden_states": random(batch, 16, 4, seed=step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "timestep": _time(batch, step),
        "img_ids": _grid(4, 4, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "attention_mask": mask.bool(),
    }


def lumina2() -> torch.nn.Module:
    return seeded(
        lambda: Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 32, 32),
            cap_feat_dim=DIM,
        )
    )


def lumina2_call(batch: int, step: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "hidden_states": random(batch, 4, 8, 8, seed=step),
        "timestep": _time(batch, step),
        "encoder_hidden_states": random(batch, TEXT, DIM, seed=50),
        "encoder_attention_mask": mask,
    }


DENOISERS = {
    "sd3": Tiny(sd3, sd3_call, image=16, text=TEXT, first=False, joint=3),
    "flux": Tiny(flux, flux_call, image=16, text=TEXT, first=True, joint=4),
    "qwen_image": Tiny(qwen_image, qwen_image_call, image=16, text=TEXT, first=True, joint=2),
    "flux2": Tiny(flux2, flux2_call, image=16, text=TEXT, first=True, joint=4),
    "z_image": Tiny(z_image, z_image_call, image=32, text=64, first=False, joint=2),
    "aura_flow": Tiny(aura_flow, aura_flow_call, image=16, text=TEXT + 8, first=True, joint=4),
    "cogvideox": Tiny(cogvideox, cogvideox_call, image=32, text=TEXT, first=True, joint=2),
    "hunyuan_video": Tiny(hunyuan_video, hunyuan_video_call, image=32, text=TEXT, first=False, joint=4),
    "chroma": Tiny(chroma, chroma_call, image=16, text=TEXT, first=True, joint=4),
    "lumina2": Tiny(lumina2, lumina2_call, image=16, text=4, first=True, joint=2),
}
