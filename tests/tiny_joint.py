"""Tiny pipelines of the real diffusers classes with joint attention, and how to call each.

Prompts are passed as embeddings, and latents are compared, so that text encoders and VAEs can be left out where the
pipeline permits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import ProcessorMixin

from tests.tiny_pipelines import TEXT_DIM, seeded
from tests.tiny_pipelines import _tokenizer as tokenizer
from tests.tiny_transformers import TOKENS, embedded, silent

#: The side of an image in pixels: VAEs are left out, and pipelines then assume a factor of 8 and patches of 2.
SIDE = 64
ROPE = (4, 4, 8)
#: Tokens of a negative prompt, where a pipeline permits another number of them than for the prompt.
FEWER = TOKENS - 2


@dataclass(frozen=True)
class Joint:
    """One pipeline.

    Attributes:
        build: makes the pipeline, always with the same weights.
        call: returns the arguments of its call for a number of prompts.
        guidance: how the halves arrive: in one batch, in two calls, or not at all.
        halved: see `OneCall` in `denoiser_reference.py`.
        kept: the position of the prompt's half in a batch.
        off: the arguments that switch guidance off.
        prompts: the largest number of prompts that diffusers' own pipeline can be called with.
        further: whether a step has further calls, for predictions that guidance moves away from.
        listed: see `OneCall`.
        other_dims: see `OneCall`.
        exact: whether the results are equal to the bit while guidance is on; a text that is the same in all steps is
            computed apart, which may change the rounding.
        needs: a package that diffusers needs for this pipeline, and that the tests do not install.
    """

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    guidance: Literal["batch", "calls", "none"] = "batch"
    halved: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    kept: int = 1
    off: Mapping[str, Any] | None = None
    prompts: int = 2
    further: bool = False
    listed: tuple[str, ...] = ()
    other_dims: Mapping[str, int] | None = None
    exact: bool = True
    needs: str = ""


def assembled(name: str | type, scheduler: Any = None, **parts: Any) -> Any:
    """Return the pipeline class `name`, or of that name, with these components, and None for all others."""
    cls: Any = getattr(diffusers, name) if isinstance(name, str) else name
    parameters = list(inspect.signature(cls).parameters.values())
    missing = {p.name: None for p in parameters if p.default is p.empty}
    scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
    return silent(cls(**{**missing, "scheduler": scheduler, **parts}))


def model(name: str, seed: int = 0, **config: Any) -> Any:
    """Return the denoiser class `name` with a tiny configuration, which `config` changes."""

    def build() -> Any:
        denoiser = getattr(diffusers, name)(**{**CONFIGS[name], **config})
        for path, parameter in denoiser.named_parameters():
            if "experts." in path and parameter.ndim == 3:
                torch.nn.init.normal_(parameter, std=0.1)  # allocated without values
        return denoiser

    return seeded(build, seed)


_HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX = {
    **_HEADS,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": ROPE,
}
_QWEN = {
    **_HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": ROPE,
}
_HUNYUAN = {
    **_HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
}
_COGVIEW = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
_COGVIDEO = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TOKENS,
}

#: Tiny configurations of the denoisers, each with two blocks of every kind where that is possible.
CONFIGS: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 64,
    },
    "BriaFiboTransformer2DModel": {**_FLUX, "text_encoder_dim": 16},
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": {
        **_FLUX,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "CogVideoXTransformer3DModel": _COGVIDEO,
    "CogView3PlusTransformer2DModel": {**_COGVIEW, "pos_embed_max_size": 16, "sample_size": 8},
    "CogView4Transformer2DModel": {**_COGVIEW, "sample_size": 8, "rope_axes_dim": (16, 16)},
    "ConsisIDTransformer3DModel": {
        **_COGVIDEO,
        "in_channels": 8,
        "cross_attn_interval": 1,
        "is_train_face": True,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 8,
        "LFE_vit_dim": 8,
        "LFE_depth": 1,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 1,
        "LFE_num_querie": 1,
        "LFE_output_dim": 21,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    },
    "EasyAnimateTransformer3DModel": {
        **_HEADS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_width": 8,
        "sample_height": 8,
        "num_layers": 2,
        "mmdit_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": TEXT_DIM,
        "rope_axes_dim": ROPE,
    },
    "Flux2Transformer2DModel": {
        **_FLUX,
        "timestep_guidance_channels": 16,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "FluxTransformer2DModel": {**_FLUX, "pooled_projection_dim": TEXT_DIM},
    "GlmImageTransformer2DModel": {**_COGVIEW, "prior_vq_quantizer_codebook_size": 16},
    "HiDreamImageTransformer2DModel": {
        **_HEADS,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [TEXT_DIM, 16],
        "text_emb_dim": TEXT_DIM,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": ROPE,
        "max_resolution": (8, 8),
        "llama_layers": [0, 1],
    },
    "HunyuanImageTransformer2DModel": {
        **_HUNYUAN,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_2_dim": 16,
        "rope_axes_dim": (8, 8),
    },
    "HunyuanVideo15Transformer3DModel": {
        **_HEADS,
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": 16,
        "image_embed_dim": 8,
        "rope_axes_dim": ROPE,
        "target_size": 16,
        "task_type": "t2v",
    },
    "HunyuanVideoTransformer3DModel": {
        **_HUNYUAN,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "patch_size_t": 1,
        "pooled_projection_dim": 16,
        "rope_axes_dim": ROPE,
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        **_HUNYUAN,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "patch_size_t": 1,
        "pooled_projection_dim": 16,
        "rope_axes_dim": ROPE,
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    },
    "Ideogram4Transformer2DModel": {
        **_HEADS,
        "in_channels": 16,
        "num_layers": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
        "llm_features_dim": TEXT_DIM,
        "mrope_section": (4, 2, 2),
    },
    "JoyImageEditTransformer3DModel": {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": TEXT_DIM,
        "num_layers": 2,
        "rope_dim_list": list(ROPE),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": TEXT_DIM,
        "num_layers": 2,
        "rope_dim_list": list(ROPE),
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": TEXT_DIM,
        "in_text_dim2": 16,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": ROPE,
        "visual_cond": False,
        "in_audio_dim": 4,
        "out_audio_dim": 4,
    },
    "Krea2Transformer2DModel": {
        **_HEADS,
        "in_channels": 16,
        "num_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": TEXT_DIM,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": ROPE,
    },
    "LongCatImageTransformer2DModel": {**_FLUX, "pooled_projection_dim": TEXT_DIM},
    "LTX2VideoTransformer3DModel": {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": 2,
        "caption_channels": TEXT_DIM,
        "rope_double_precision": False,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": ROPE,
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": TEXT_DIM,
    },
    "MochiTransformer3DModel": {
        **_HEADS,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 8,
        "max_sequence_length": TOKENS,
    },
    "MotifVideoTransformer3DModel": {
        **_HEADS,
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "rope_axes_dim": ROPE,
    },
    "NucleusMoEImageTransformer2DModel": {
        **_QWEN,
        "num_layers": 3,
        "num_experts": 4,
        "moe_intermediate_dim": 16,
        "capacity_factors": 2.0,
        "dense_moe_strategy": "leave_first_block_dense",
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 64,
        "time_step_dim": 16,
        "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    },
    "OvisImageTransformer2DModel": {**_FLUX, "out_channels": 16},
    "PRXTransformer2DModel": {
        "in_channels": 4,
        "context_in_dim": TEXT_DIM,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    },
    "QwenImage21Transformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "context_in_dim": TEXT_DIM,
        "axes_dims_rope": ROPE,
    },
    "QwenImageTransformer2DModel": _QWEN,
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 16,
        "pooled_projection_dim": TEXT_DIM,
        "out_channels": 4,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_DIM,
        "axes_dims": list(ROPE),
        "axes_lens": [256, 32, 32],
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": TEXT_DIM,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 32,
        "axes_dims": ROPE,
        "axes_lens": (256, 32, 32),
    },
}


def texts(
    batch: int,
    *,
    masks: str = "",
    dim: int = TEXT_DIM,
    tokens: int = TOKENS,
    pooled: int = 0,
    mask: torch.dtype = torch.bool,
) -> dict[str, Any]:
    """Return embedded prompts and negative prompts, with `tokens` tokens for the latter.

    `masks` is the name of their masks' arguments with `{}` for the prompt's, and `pooled` the size of pooled text.
    """
    call: dict[str, Any] = {
        "prompt_embeds": embedded(batch, TOKENS, dim, seed=1),
        "negative_prompt_embeds": embedded(batch, tokens, dim, seed=2),
    }
    if masks:
        call[masks.format("prompt")] = torch.ones(batch, TOKENS, dtype=mask)
        call[masks.format("negative_prompt")] = torch.ones(batch, tokens, dtype=mask)
    if pooled:
        call["pooled_prompt_embeds"] = embedded(batch, pooled, seed=3)
        call["negative_pooled_prompt_embeds"] = embedded(batch, pooled, seed=4)
    return call


def sized(**call: Any) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE, **call}


def picture(side: int = SIDE) -> Image.Image:
    pixels = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(11))
    return Image.fromarray((255 * pixels).to(torch.uint8).numpy())


def video_of(frames: int) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE, "num_frames": frames}


def _vae() -> Any:
    return _vae_of(4)


@functools.cache
def _vae_of(channels: int) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            norm_num_groups=4,
            layers_per_block=1,
            shift_factor=0.1,
        ),
        1,
    )


def _qwen_vae() -> Any:
    return _qwen_vae_of(3)


@functools.cache
def _qwen_vae_of(channels: int) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            input_channels=channels,
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        1,
    )


@functools.cache
def _flux_2_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        1,
    )


@functools.cache
def _wan_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        1,
    )


@functools.cache
def _cogvideo_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        1,
    )


@functools.cache
def _hunyuan_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        1,
    )


@functools.cache
def _magvit() -> Any:
    downs, ups = ("SpatialTemporalDownBlock3D",) * 3, ("SpatialTemporalUpBlock3D",) * 3
    return seeded(
        lambda: diffusers.AutoencoderKLMagvit(
            down_block_types=("SpatialDownBlock3D", *downs),
            up_block_types=("SpatialUpBlock3D", *ups),
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        1,
    )


class TextProcessor(ProcessorMixin):  # type: ignore[misc]
    """The part of a vision-language model's processor that handles text."""

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "CLIPTokenizer"

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return a batch, as processors of images and text do."""
        return [super().apply_chat_template(*args, **kwargs)]


def _processor() -> Any:
    template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    return TextProcessor(tokenizer=tokenizer(), chat_template=template)


# Calls.


def _flux_call(batch: int) -> dict[str, Any]:
    return sized(**texts(batch, pooled=TEXT_DIM), true_cfg_scale=8.0)


def _qwen_call(batch: int) -> dict[str, Any]:
    return sized(**texts(batch, tokens=FEWER, masks="{}_embeds_mask", mask=torch.long), true_cfg_scale=8.0)


def _z_image_call(batch: int) -> dict[str, Any]:
    call = texts(batch, tokens=FEWER)
    return sized(**{name: list(value) for name, value in call.items()}, guidance_scale=8.0)


def _sd3_call(batch: int) -> dict[str, Any]:
    return sized(**texts(batch, pooled=TEXT_DIM))


def _plain_call(batch: int) -> dict[str, Any]:
    return sized(**texts(batch), guidance_scale=8.0)


def _masked_call(batch: int) -> dict[str, Any]:
    return sized(**texts(batch, masks="{}_attention_mask"), guidance_scale=8.0)


def _krea_call(batch: int) -> dict[str, Any]:
    call = texts(batch, masks="{}_embeds_mask")
    both = {name: call[name].unflatten(-1, (1, TEXT_DIM)).repeat(1, 1, 2, 1) for name in list(call)[:2]}
    return sized(**{**call, **both}, guidance_scale=8.0)


def _one_prompt(call: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    """Return `call` for a pipeline without guidance, with the prompts only."""
    return lambda batch: {name: value for name, value in call(batch).items() if not _is_of_guidance(name)}


def _is_of_guidance(name: str) -> bool:
    return name.startswith("negative_") or name == "true_cfg_scale"


def _hidream_call(batch: int) -> dict[str, Any]:
    call: dict[str, Any] = {}
    for seed, prefix in ((1, ""), (5, "negative_")):
        call[f"{prefix}prompt_embeds_t5"] = embedded(batch, TOKENS, TEXT_DIM, seed=seed)
        layers = embedded(batch, 2, TOKENS, 16, seed=seed + 1)
        call[f"{prefix}prompt_embeds_llama3"] = layers.transpose(0, 1).contiguous()
        call[f"{prefix}pooled_prompt_embeds"] = embedded(batch, TEXT_DIM, seed=seed + 2)
    return sized(**call, guidance_scale=8.0)


def _glm_call(batch: int) -> dict[str, Any]:
    prior = torch.arange(16).remainder(16).repeat(batch, 1)
    return sized(**texts(batch, dim=TEXT_DIM), prior_token_ids=prior, guidance_scale=8.0)


def _two_encoders_call(batch: int) -> dict[str, Any]:
    """Return the arguments of HunyuanImage and HunyuanVideo 1.5, which have two text encoders."""
    call = texts(batch, masks="{}_embeds_mask", mask=torch.long)
    for name, seed in (("prompt", 3), ("negative_prompt", 4)):
        call[f"{name}_embeds_2"] = embedded(batch, TOKENS, 16, seed=seed)
        call[f"{name}_embeds_mask_2"] = torch.ones(batch, TOKENS, dtype=torch.long)
    return call


def _hunyuan_video_call(batch: int) -> dict[str, Any]:
    call = texts(batch, pooled=16)
    for name in ("prompt", "negative_prompt"):
        call[f"{name}_attention_mask"] = torch.ones(batch, TOKENS, dtype=torch.bool)
    return {**call, **video_of(5), "true_cfg_scale": 8.0}


def _with(call: Callable[[int], dict[str, Any]], **more: Any) -> Callable[[int], dict[str, Any]]:
    """Return `call` with further arguments; functions among them are called."""
    return lambda batch: {
        **call(batch),
        **{name: value() if callable(value) else value for name, value in more.items()},
    }


def _of(name: str, model_name: str, *, parts: Mapping[str, Callable[[], Any]] | None = None, **config: Any) -> Any:
    """Return a function that makes the pipeline class `name` with a denoiser and with `parts`."""
    return lambda: assembled(
        name, **{"transformer": model(model_name, **config), **{key: make() for key, make in (parts or {}).items()}}
    )


def mask_picture() -> Image.Image:
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 255
    return Image.fromarray(left.to(torch.uint8).numpy())


_NO_TRUE_GUIDANCE = {"true_cfg_scale": 1.0}
_NO_GUIDANCE = {"guidance_scale": 1.0}
_BATCH = ("hidden_states", "timestep", "encoder_hidden_states")
_SD3_BATCH = (*_BATCH, "pooled_projections")
_MASKED_BATCH = (*_BATCH, "encoder_attention_mask")
_Z_BATCH: dict[str, Any] = {"halved": ("x", "t", "cap_feats"), "listed": ("x", "cap_feats"), "kept": 0}
_EDIT = {"image": picture, "mask_image": mask_picture, "strength": 1.0}
_GUIDER = {"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=8.0)}


def _chroma_inpaint() -> Any:
    pipe = _of("ChromaInpaintPipeline", "ChromaTransformer2DModel", parts={"vae": _vae})()
    pipe.transformer.register_to_config(guidance_embeds=False)  # which this pipeline reads, and the class does not set
    return pipe


JOINT: dict[str, Joint] = {
    # Stable Diffusion 3.
    "StableDiffusion3Pipeline": Joint(
        _of("StableDiffusion3Pipeline", "SD3Transformer2DModel"), _sd3_call, halved=_SD3_BATCH, off=_NO_GUIDANCE
    ),
    "StableDiffusion3Img2ImgPipeline": Joint(
        _of("StableDiffusion3Img2ImgPipeline", "SD3Transformer2DModel", parts={"vae": _vae}),
        _with(_sd3_call, image=picture, strength=1.0),
        halved=_SD3_BATCH,
    ),
    "StableDiffusion3ControlNetPipeline": Joint(
        lambda: _sd3_controlnet("StableDiffusion3ControlNetPipeline"),
        _with(_sd3_call, control_image=picture),
        halved=(*_SD3_BATCH, "block_controlnet_hidden_states"),
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Joint(
        lambda: _sd3_controlnet("StableDiffusion3ControlNetInpaintingPipeline", extra_conditioning_channels=1),
        _with(_sd3_call, control_image=picture, control_mask=mask_picture),
        halved=(*_SD3_BATCH, "block_controlnet_hidden_states"),
    ),
    # FLUX.1.
    "FluxPipeline": Joint(
        _of("FluxPipeline", "FluxTransformer2DModel", guidance_embeds=True), _flux_call, "calls", off=_NO_TRUE_GUIDANCE
    ),
    "FluxImg2ImgPipeline": Joint(
        _of("FluxImg2ImgPipeline", "FluxTransformer2DModel", parts={"vae": _vae}),
        _with(_flux_call, image=picture, strength=1.0),
        "calls",
    ),
    "FluxInpaintPipeline": Joint(
        _of("FluxInpaintPipeline", "FluxTransformer2DModel", parts={"vae": _vae}), _with(_flux_call, **_EDIT), "calls"
    ),
    "FluxKontextPipeline": Joint(
        _of("FluxKontextPipeline", "FluxTransformer2DModel", parts={"vae": _vae}),
        _with(_flux_call, image=picture, _auto_resize=False, max_area=SIDE**2),
        "calls",
        off=_NO_TRUE_GUIDANCE,
    ),
    "FluxKontextInpaintPipeline": Joint(
        _of("FluxKontextInpaintPipeline", "FluxTransformer2DModel", parts={"vae": _vae}),
        _with(_flux_call, **_EDIT, _auto_resize=False, max_area=SIDE**2),
        "calls",
    ),
    "FluxControlNetPipeline": Joint(
        lambda: _flux_controlnet("FluxControlNetPipeline"), _with(_flux_call, control_image=picture), "calls"
    ),
    "FluxControlNetImg2ImgPipeline": Joint(
        lambda: _flux_controlnet("FluxControlNetImg2ImgPipeline"),
        _with(_one_prompt(_flux_call), control_image=picture, image=picture, strength=1.0),
        "none",
    ),
    "FluxControlNetInpaintPipeline": Joint(
        lambda: _flux_controlnet("FluxControlNetInpaintPipeline"),
        _with(_one_prompt(_flux_call), control_image=picture, **_EDIT),
        "none",
    ),
    "FluxControlPipeline": Joint(
        _of("FluxControlPipeline", "FluxTransformer2DModel", parts={"vae": _vae}, in_channels=32, out_channels=16),
        _with(_one_prompt(_flux_call), control_image=picture),
        "none",
    ),
    "FluxControlImg2ImgPipeline": Joint(
        _of(
            "FluxControlImg2ImgPipeline", "FluxTransformer2DModel", parts={"vae": _vae}, in_channels=32, out_channels=16
        ),
        _with(_one_prompt(_flux_call), control_image=picture, image=picture, strength=1.0),
        "none",
    ),
    "FluxControlInpaintPipeline": Joint(
        _of(
            "FluxControlInpaintPipeline", "FluxTransformer2DModel", parts={"vae": _vae}, in_channels=32, out_channels=16
        ),
        _with(_one_prompt(_flux_call), control_image=picture, **_EDIT),
        "none",
    ),
    "FluxFillPipeline": Joint(
        _of("FluxFillPipeline", "FluxTransformer2DModel", parts={"vae": _vae}, in_channels=288, out_channels=16),
        _with(_one_prompt(_flux_call), **_EDIT),
        "none",
    ),
    # FLUX.2.
    "Flux2Pipeline": Joint(_of("Flux2Pipeline", "Flux2Transformer2DModel"), _one_prompt(_plain_call), "none"),
    "Flux2KleinPipeline": Joint(
        _of("Flux2KleinPipeline", "Flux2Transformer2DModel", parts={"vae": _flux_2_vae}, guidance_embeds=False),
        _with(_plain_call, image=picture),
        "calls",
        off=_NO_GUIDANCE,
    ),
    "Flux2KleinInpaintPipeline": Joint(
        _of("Flux2KleinInpaintPipeline", "Flux2Transformer2DModel", parts={"vae": _flux_2_vae}, guidance_embeds=False),
        _with(_plain_call, **_EDIT),
        "calls",
    ),
    "Flux2KleinKVPipeline": Joint(
        _of("Flux2KleinKVPipeline", "Flux2Transformer2DModel", parts={"vae": _flux_2_vae}, guidance_embeds=False),
        lambda batch: sized(prompt_embeds=embedded(batch, TOKENS, TEXT_DIM, seed=1), image=picture()),
        "none",
    ),
    # Qwen-Image.
    "QwenImagePipeline": Joint(
        _of("QwenImagePipeline", "QwenImageTransformer2DModel"), _qwen_call, "calls", off=_NO_TRUE_GUIDANCE
    ),
    "QwenImageImg2ImgPipeline": Joint(
        _of("QwenImageImg2ImgPipeline", "QwenImageTransformer2DModel", parts={"vae": _qwen_vae}),
        _with(_qwen_call, image=picture, strength=1.0),
        "calls",
    ),
    "QwenImageInpaintPipeline": Joint(
        _of("QwenImageInpaintPipeline", "QwenImageTransformer2DModel", parts={"vae": _qwen_vae}),
        _with(_qwen_call, **_EDIT),
        "calls",
    ),
    "QwenImageControlNetPipeline": Joint(
        lambda: _qwen_controlnet("QwenImageControlNetPipeline"), _with(_qwen_call, control_image=picture), "calls"
    ),
    "QwenImageControlNetInpaintPipeline": Joint(
        lambda: _qwen_controlnet("QwenImageControlNetInpaintPipeline", extra_condition_channels=4),
        _with(_qwen_call, control_image=picture, control_mask=mask_picture),
        "calls",
    ),
    "QwenImageEditPipeline": Joint(
        _of("QwenImageEditPipeline", "QwenImageTransformer2DModel", parts={"vae": _qwen_vae}),
        _with(_qwen_call, image=picture),
        "calls",
    ),
    "QwenImageEditInpaintPipeline": Joint(
        _of("QwenImageEditInpaintPipeline", "QwenImageTransformer2DModel", parts={"vae": _qwen_vae}),
        _with(_qwen_call, **_EDIT, true_cfg_scale=60.0),
        "calls",
        prompts=1,
    ),
    "QwenImageEditPlusPipeline": Joint(
        _of("QwenImageEditPlusPipeline", "QwenImageTransformer2DModel", parts={"vae": _qwen_vae}),
        _with(_qwen_call, image=picture),
        "calls",
        prompts=1,
    ),
    "QwenImage21Pipeline": Joint(
        _of("QwenImage21Pipeline", "QwenImage21Transformer2DModel", parts={"processor": _processor}),
        _qwen_call,
        "calls",
    ),
    # Z-Image.
    "ZImagePipeline": Joint(
        _of("ZImagePipeline", "ZImageTransformer2DModel"), _z_image_call, off={"guidance_scale": 0.0}, **_Z_BATCH
    ),
    "ZImageImg2ImgPipeline": Joint(
        _of("ZImageImg2ImgPipeline", "ZImageTransformer2DModel", parts={"vae": _vae}),
        _with(_z_image_call, image=picture, strength=1.0),
        **_Z_BATCH,
    ),
    "ZImageInpaintPipeline": Joint(
        _of("ZImageInpaintPipeline", "ZImageTransformer2DModel", parts={"vae": _vae}),
        _with(_z_image_call, **_EDIT),
        **_Z_BATCH,
    ),
    # Others that make images.
    "AuraFlowPipeline": Joint(
        _of("AuraFlowPipeline", "AuraFlowTransformer2DModel"), _with(_masked_call, guidance_scale=30.0)
    ),
    "BriaPipeline": Joint(_of("BriaPipeline", "BriaTransformer2DModel", parts={"vae": _vae}), _plain_call),
    "BriaFibo2Pipeline": Joint(
        _of("BriaFibo2Pipeline", "BriaFibo2Transformer2DModel"),
        lambda batch: sized(
            **{
                name: value[:, None].repeat(1, 2, 1, 1) if "mask" not in name else value
                for name, value in texts(batch, masks="{}_embeds_mask", tokens=FEWER).items()
            },
            guidance_scale=8.0,
        ),
        "calls",
    ),
    "ChromaPipeline": Joint(
        _of("ChromaPipeline", "ChromaTransformer2DModel"),
        lambda batch: sized(**texts(batch, tokens=FEWER, masks="{}_attention_mask"), guidance_scale=8.0),
        "calls",
    ),
    "ChromaImg2ImgPipeline": Joint(
        _of("ChromaImg2ImgPipeline", "ChromaTransformer2DModel", parts={"vae": _vae}),
        _with(_masked_call, image=picture, strength=1.0),
        "calls",
    ),
    "ChromaInpaintPipeline": Joint(
        _chroma_inpaint,
        _with(_masked_call, **_EDIT),
        "calls",
    ),
    "CogView3PlusPipeline": Joint(
        lambda: assembled(
            "CogView3PlusPipeline",
            diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
            transformer=model("CogView3PlusTransformer2DModel"),
        ),
        _plain_call,
        halved=(*_BATCH, "original_size", "target_size", "crop_coords"),
    ),
    "CogView4Pipeline": Joint(_of("CogView4Pipeline", "CogView4Transformer2DModel"), _plain_call, "calls"),
    "CogView4ControlPipeline": Joint(
        _of("CogView4ControlPipeline", "CogView4Transformer2DModel", parts={"vae": _vae}, in_channels=8),
        _with(_plain_call, control_image=picture),
        "calls",
    ),
    "ErnieImagePipeline": Joint(
        _of("ErnieImagePipeline", "ErnieImageTransformer2DModel"),
        lambda batch: sized(
            **{name: list(value) for name, value in texts(batch, tokens=FEWER).items()}, guidance_scale=8.0
        ),
        halved=("hidden_states", "timestep", "text_bth", "text_lens"),
    ),
    "GlmImagePipeline": Joint(_of("GlmImagePipeline", "GlmImageTransformer2DModel"), _glm_call, "calls"),
    "HiDreamImagePipeline": Joint(
        _of("HiDreamImagePipeline", "HiDreamImageTransformer2DModel"),
        _hidream_call,
        halved=(
            "hidden_states",
            "timesteps",
            "encoder_hidden_states_t5",
            "encoder_hidden_states_llama3",
            "pooled_embeds",
        ),
        other_dims={"encoder_hidden_states_llama3": 1},
    ),
    "HunyuanImagePipeline": Joint(
        _of("HunyuanImagePipeline", "HunyuanImageTransformer2DModel", parts=_GUIDER),
        lambda batch: {**_two_encoders_call(batch), "height": 256, "width": 256},
        "calls",
    ),
    "JoyImageEditPipeline": Joint(
        _of("JoyImageEditPipeline", "JoyImageEditTransformer3DModel", parts={"vae": _wan_vae}),
        lambda batch: sized(**texts(batch, masks="{}_embeds_mask"), guidance_scale=8.0),
        "calls",
    ),
    "Krea2Pipeline": Joint(_of("Krea2Pipeline", "Krea2Transformer2DModel"), _krea_call, "calls"),
    "Lumina2Pipeline": Joint(_of("Lumina2Pipeline", "Lumina2Transformer2DModel"), _masked_call, "calls"),
    "NucleusMoEImagePipeline": Joint(
        _of("NucleusMoEImagePipeline", "NucleusMoEImageTransformer2DModel"),
        lambda batch: sized(**texts(batch, masks="{}_embeds_mask"), guidance_scale=8.0),
        "calls",
    ),
    "OvisImagePipeline": Joint(
        _of("OvisImagePipeline", "OvisImageTransformer2DModel"), _with(_plain_call, negative_prompt=None), "calls"
    ),
    "PRXPipeline": Joint(
        _of("PRXPipeline", "PRXTransformer2DModel"),
        _with(_masked_call, use_resolution_binning=False),
        halved=("hidden_states", "timestep", "encoder_hidden_states", "attention_mask"),
        prompts=1,
    ),
    # Video.
    "CogVideoXPipeline": Joint(
        lambda: _cogvideo("CogVideoXPipeline", use_rotary_positional_embeddings=True),
        lambda batch: {**texts(batch), **video_of(9), "guidance_scale": 8.0, "max_sequence_length": TOKENS},
    ),
    "CogVideoXImageToVideoPipeline": Joint(
        lambda: _cogvideo("CogVideoXImageToVideoPipeline", in_channels=8, vae=_cogvideo_vae()),
        lambda batch: {
            **texts(batch),
            **video_of(9),
            "guidance_scale": 8.0,
            "max_sequence_length": TOKENS,
            "image": picture(),
        },
        prompts=1,
    ),
    "CogVideoXVideoToVideoPipeline": Joint(
        lambda: _cogvideo("CogVideoXVideoToVideoPipeline", vae=_cogvideo_vae()),
        lambda batch: {
            **texts(batch),
            "height": SIDE,
            "width": SIDE,
            "guidance_scale": 8.0,
            "max_sequence_length": TOKENS,
            "video": [picture()] * 9,
            "strength": 1.0,
        },
        prompts=1,
    ),
    "EasyAnimatePipeline": Joint(
        _of("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", parts={"vae": _magvit}),
        lambda batch: {**texts(batch, masks="{}_attention_mask"), **video_of(5), "guidance_scale": 8.0},
    ),
    "HunyuanVideoPipeline": Joint(
        _of("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel"), _hunyuan_video_call, "calls"
    ),
    "HunyuanVideo15Pipeline": Joint(
        _of("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", parts={**_GUIDER, "vae": _hunyuan_vae}),
        lambda batch: {**_two_encoders_call(batch), "height": 16, "width": 16, "num_frames": 5},
        "calls",
    ),
    "LTX2Pipeline": Joint(
        lambda: _ltx_2(),
        lambda batch: {
            **texts(batch, masks="{}_attention_mask", mask=torch.long),
            **video_of(9),
            "guidance_scale": 8.0,
            "spatio_temporal_guidance_blocks": [1],
        },
        halved=(
            "hidden_states",
            "audio_hidden_states",
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "timestep",
            "sigma",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
            "video_coords",
            "audio_coords",
        ),
        further=True,
    ),
    "MochiPipeline": Joint(
        _of("MochiPipeline", "MochiTransformer3DModel"),
        lambda batch: {**texts(batch, masks="{}_attention_mask"), **video_of(7), "guidance_scale": 8.0},
        halved=_MASKED_BATCH,
    ),
    "MotifVideoPipeline": Joint(
        _of("MotifVideoPipeline", "MotifVideoTransformer3DModel", parts={**_GUIDER, "vae": _wan_vae}),
        lambda batch: {**texts(batch, masks="{}_attention_mask"), **video_of(5)},
        "calls",
    ),
    "Kandinsky6TI2VAPipeline": Joint(
        _of("Kandinsky6TI2VAPipeline", "Kandinsky6Transformer3DModel"),
        lambda batch: {**texts(batch, pooled=16), **video_of(5), "guidance_scale": 8.0, "sample_audio": False},
        "calls",
    ),
}


def _ltx_2(name: str = "LTX2Pipeline", **config: Any) -> Any:
    """Return LTX-2, which makes two further predictions in a step: with blocks skipped, and with modalities apart."""
    connectors = seeded(
        lambda: diffusers.pipelines.ltx2.connectors.LTX2TextConnectors(
            caption_channels=TEXT_DIM,
            text_proj_in_factor=1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
        ),
        3,
    )
    transformer = model("LTX2VideoTransformer3DModel", audio_in_channels=4, audio_out_channels=4, **config)
    audio_vae = seeded(
        lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            resolution=32,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            mel_bins=8,
        ),
        4,
    )
    vae = seeded(
        lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=8,
        ),
        5,
    )
    return assembled(name, transformer=transformer, connectors=connectors, audio_vae=audio_vae, vae=vae)


def _sd3_controlnet(name: str, **config: Any) -> Any:
    transformer = model("SD3Transformer2DModel")
    settings = {
        key: value
        for key, value in CONFIGS["SD3Transformer2DModel"].items()
        if key not in ("qk_norm", "dual_attention_layers")
    }
    controlnet = seeded(lambda: diffusers.SD3ControlNetModel(**{**settings, "num_layers": 1, **config}), 6)
    return assembled(name, transformer=transformer, controlnet=controlnet, vae=_vae())


def _flux_controlnet(name: str) -> Any:
    controlnet = seeded(lambda: diffusers.FluxControlNetModel(**CONFIGS["FluxTransformer2DModel"]), 6)
    return assembled(name, transformer=model("FluxTransformer2DModel"), controlnet=controlnet, vae=_vae())


def _qwen_controlnet(name: str, **config: Any) -> Any:
    controlnet = seeded(lambda: diffusers.QwenImageControlNetModel(**{**_QWEN, "num_layers": 1, **config}), 6)
    return assembled(name, transformer=model("QwenImageTransformer2DModel"), controlnet=controlnet, vae=_qwen_vae())


def _cogvideo(name: str, vae: Any = None, **config: Any) -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return assembled(name, scheduler, transformer=model("CogVideoXTransformer3DModel", **config), vae=vae)
