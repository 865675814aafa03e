"""More tiny pipelines of the real diffusers classes with joint attention: those that need a text encoder, and siblings.

Many pipelines accept embedded prompts only in part, so they have tiny language models of the real classes here.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import diffusers
import torch
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from tests.tiny_joint import (
    _BATCH,
    _EDIT,
    _GUIDER,
    _NO_GUIDANCE,
    _SD3_BATCH,
    _Z_BATCH,
    CONFIGS,
    JOINT,
    ROPE,
    SIDE,
    Joint,
    _cogvideo_vae,
    _masked_call,
    _of,
    _sd3_call,
    _vae,
    _vae_of,
    _wan_vae,
    _with,
    _z_image_call,
    assembled,
    embedded,
    mask_picture,
    model,
    picture,
    sized,
    texts,
    video_of,
)
from tests.tiny_joint_videos import VIDEOS
from tests.tiny_language_models import picture_reader_2, qwen_2_5, qwen_3, reader, siglip_2, smol, t5, words
from tests.tiny_pipelines import TEXT_DIM, _text_encoder, _tokenizer, seeded
from tests.tiny_transformers import TOKENS, silent

_PROMPTS = ["a red cat", "a blue dog"]


def _prompts(batch: int) -> dict[str, Any]:
    return {"prompt": _PROMPTS[:batch], "negative_prompt": ["dog"] * batch, "guidance_scale": 8.0}


def _longcat(name: str, **parts: Any) -> Any:
    pipe = assembled(
        name,
        transformer=model("LongCatImageTransformer2DModel", in_channels=64),
        text_encoder=qwen_2_5(),
        tokenizer=words(),
        text_processor=reader(),
        **parts,
    )
    pipe.tokenizer_max_length = TOKENS
    return pipe


@functools.cache
def _coarse_vae() -> Any:
    """Return a VAE with a scale factor of 128, for a pipeline that makes images of about 1024 pixels."""
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(4,) * 8,
            down_block_types=("DownEncoderBlock2D",) * 8,
            up_block_types=("UpDecoderBlock2D",) * 8,
            latent_channels=16,
            norm_num_groups=2,
            layers_per_block=1,
            shift_factor=0.1,
        ),
        1,
    )


def _consisid() -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return assembled(ConsisIDPipeline, scheduler, transformer=model("ConsisIDTransformer3DModel"), vae=_cogvideo_vae())


def _joy() -> Any:
    pipe = assembled(
        "JoyImageEditPlusPipeline",
        transformer=model("JoyImageEditPlusTransformer3DModel"),
        text_encoder=qwen_3(),
        tokenizer=words(),
        processor=reader(),
        vae=_coarse_wan_vae(),
    )
    pipe.prompt_template_encode_start_idx = {"multiple_images": 0}
    return pipe


@functools.cache
def _coarse_wan_vae() -> Any:
    """Return a VAE with a scale factor of 128, for a pipeline that makes images of about 1024 pixels."""
    return seeded(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False] * 3,
            patch_size=16,
            in_channels=3 * 16**2,
            out_channels=3 * 16**2,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=128,
        ),
        1,
    )


def _cosmos_3() -> Any:
    transformer = seeded(
        lambda: diffusers.Cosmos3OmniTransformer(
            head_dim=6,
            hidden_size=12,
            intermediate_size=24,
            latent_channel=4,
            latent_patch_size=1,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=1,
            patch_latent_dim=4,
            rope_axes_dim=[1, 1, 1],
            vocab_size=len(words()),
        )
    )
    return assembled(
        "Cosmos3OmniPipeline",
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=transformer,
        text_tokenizer=words(),
        vae=_wan_vae(),
        enable_safety_checker=False,
        default_use_system_prompt=False,
    )


def _z_image_controlnet(name: str, channels: int) -> Any:
    """Return Z-Image with a ControlNet, which shares the embedders of the denoiser."""
    keys = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")
    config = {key: CONFIGS["ZImageTransformer2DModel"][key] for key in keys}
    controlnet = seeded(
        lambda: diffusers.ZImageControlNetModel(
            **config, control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels
        ),
        6,
    )
    return assembled(name, transformer=model("ZImageTransformer2DModel"), controlnet=controlnet, vae=_vae())


@functools.cache
def _coarse_qwen_vae() -> Any:
    """Return a VAE with a scale factor of 64, for a pipeline that makes images of about 640 pixels."""
    return seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            input_channels=4,
            base_dim=4,
            z_dim=3,
            dim_mult=[1] * 7,
            num_res_blocks=1,
            temperal_downsample=[False] * 6,
            latents_mean=[0.0] * 3,
            latents_std=[1.0] * 3,
        ),
        1,
    )


@functools.cache
def _refiner_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLHunyuanImageRefiner(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        1,
    )


def _z_image_omni() -> Any:
    return assembled(
        "ZImageOmniPipeline",
        transformer=model("ZImageTransformer2DModel", siglip_feat_dim=8),
        vae=_half_vae(),
        siglip=siglip_2(),
        siglip_processor=picture_reader_2(),
    )


@functools.cache
def _half_vae() -> Any:
    return copy.deepcopy(_vae()).bfloat16()  # the pipeline encodes images in this dtype


def _segments(batch: int) -> dict[str, Any]:
    """Return embedded prompts in the segments before, between and after two images."""
    call = {"height": SIDE, "width": SIDE, "guidance_scale": 8.0, "image": [picture(), picture(80)]}
    for seed, name in ((1, "prompt_embeds"), (5, "negative_prompt_embeds")):
        rows = [embedded(batch, 3, TEXT_DIM, seed=seed + part) for part in range(4)]
        call[name] = [[part[row] for part in rows] for row in range(batch)]
    return call


def _visual_cloze(name: str) -> Any:
    pipe = assembled(
        name,
        transformer=model("FluxTransformer2DModel", in_channels=288, out_channels=16, guidance_embeds=True),
        vae=_vae(),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=words(),
        resolution=32,
    )
    for part in (getattr(pipe, f"{stage}_pipe", pipe) for stage in ("generation", "upsampling")):
        silent(part)
    return pipe


def _visual_cloze_call(batch: int) -> dict[str, Any]:
    example = [[picture(32), picture(32)], [picture(32), None]]
    return {
        "task_prompt": ["dog"] * batch,
        "content_prompt": _PROMPTS[:batch],
        "image": [example] * batch,
        "max_sequence_length": 8,
    }


_BRIA_FIBO = (*_BATCH, "text_encoder_layers", "joint_attention_kwargs")


MORE_JOINT: dict[str, Joint] = {
    "LongCatImagePipeline": Joint(
        lambda: _longcat("LongCatImagePipeline"),
        lambda batch: sized(**_prompts(batch), enable_prompt_rewrite=False),
        "calls",
    ),
    "LongCatImageEditPipeline": Joint(
        lambda: _longcat("LongCatImageEditPipeline", vae=_coarse_vae()),
        lambda batch: {**_prompts(1), "negative_prompt": "dog", "image": picture()},
        "calls",
        prompts=1,
    ),
    "BriaFiboPipeline": Joint(
        _of("BriaFiboPipeline", "BriaFiboTransformer2DModel", parts={"text_encoder": smol, "tokenizer": words}),
        lambda batch: sized(**_prompts(batch)),
        halved=_BRIA_FIBO,
        off=_NO_GUIDANCE,
    ),
    "BriaFiboEditPipeline": Joint(
        _of(
            "BriaFiboEditPipeline",
            "BriaFiboTransformer2DModel",
            parts={"text_encoder": smol, "tokenizer": words, "vae": _wan_vae},
            in_channels=4,
        ),
        lambda batch: sized(
            **{**_prompts(batch), "prompt": [f'{{"edit_instruction": "{p}"}}' for p in _PROMPTS[:batch]]},
            image=picture(),
        ),
        halved=_BRIA_FIBO,
    ),
    "StableDiffusion3InpaintPipeline": Joint(
        _of(
            "StableDiffusion3InpaintPipeline",
            "SD3Transformer2DModel",
            parts={"vae": lambda: _vae_of(16)},
            in_channels=16,
            out_channels=16,
        ),
        _with(_sd3_call, **_EDIT),
        halved=_SD3_BATCH,
    ),
    "QwenImageLayeredPipeline": Joint(
        _of(
            "QwenImageLayeredPipeline",
            "QwenImageTransformer2DModel",
            parts={"vae": _coarse_qwen_vae, "text_encoder": qwen_2_5, "tokenizer": words},
            in_channels=12,
            out_channels=3,
            use_additional_t_cond=True,
            use_layer3d_rope=True,
        ),
        lambda batch: {
            "prompt": "a red cat",
            "negative_prompt": "dog",
            "true_cfg_scale": 8.0,
            "image": picture().convert("RGBA"),
            "layers": 1,
            "resolution": 640,
            "output_type": "pt",  # it cannot return its latents
        },
        "calls",
        prompts=1,
    ),
    "ZImageControlNetPipeline": Joint(
        lambda: _z_image_controlnet("ZImageControlNetPipeline", 4),
        _with(_z_image_call, control_image=picture),
        **{**_Z_BATCH, "halved": (*_Z_BATCH["halved"], "controlnet_block_samples")},
    ),
    "ZImageControlNetInpaintPipeline": Joint(
        lambda: _z_image_controlnet("ZImageControlNetInpaintPipeline", 9),
        _with(_z_image_call, control_image=picture, image=picture, mask_image=mask_picture),
        prompts=1,
        **{**_Z_BATCH, "halved": (*_Z_BATCH["halved"], "controlnet_block_samples")},
    ),
    "ZImageOmniPipeline": Joint(
        _z_image_omni,
        _segments,
        **{
            **_Z_BATCH,
            "halved": (*_Z_BATCH["halved"], "siglip_feats", "image_noise_mask"),
            "listed": (*_Z_BATCH["listed"], "siglip_feats", "image_noise_mask"),
        },
    ),
    "VisualClozeGenerationPipeline": Joint(
        lambda: _visual_cloze("VisualClozeGenerationPipeline"), _visual_cloze_call, "none"
    ),
    "VisualClozePipeline": Joint(
        lambda: _visual_cloze("VisualClozePipeline"),
        _with(_visual_cloze_call, upsampling_height=SIDE, upsampling_width=SIDE),
        "none",
        prompts=1,
    ),
    "HunyuanImageRefinerPipeline": Joint(
        _of(
            "HunyuanImageRefinerPipeline",
            "HunyuanImageTransformer2DModel",
            parts={**_GUIDER, "vae": _refiner_vae},
            in_channels=16,
            out_channels=8,
            patch_size=(1, 1, 1),
            rope_axes_dim=ROPE,
            guidance_embeds=True,
            text_embed_2_dim=None,
        ),
        lambda batch: sized(**texts(batch, masks="{}_embeds_mask", mask=torch.long), image=picture()),
        "calls",
    ),
    "PRXPixelPipeline": Joint(
        _of("PRXPixelPipeline", "PRXTransformer2DModel", in_channels=3),
        lambda batch: {**_masked_call(batch), "height": 16, "width": 16, "use_resolution_binning": False},
        halved=("hidden_states", "timestep", "encoder_hidden_states", "attention_mask"),
        prompts=1,
    ),
    "JoyImageEditPlusPipeline": Joint(
        lambda: _joy(),
        lambda batch: {**_prompts(batch), "images": [[picture()]] * batch, "height": 1024, "width": 1024},
        halved=(*_BATCH, "encoder_hidden_states_mask", "shape_list"),
        listed=("shape_list",),
        prompts=1,
    ),
    "Cosmos3OmniPipeline": Joint(
        lambda: _cosmos_3(),
        lambda batch: {
            "prompt": "a red cat",
            "negative_prompt": "dog",
            "guidance_scale": 8.0,
            "height": 32,
            "width": 32,
            "num_frames": 1,
        },
        "calls",
        prompts=1,
    ),
    "OmniGenPipeline": Joint(
        _of("OmniGenPipeline", "OmniGenTransformer2DModel", parts={"tokenizer": words, "vae": _vae}),
        lambda batch: sized(prompt=_PROMPTS[:batch], guidance_scale=8.0),
        halved=("hidden_states", "timestep", "input_ids", "attention_mask", "position_ids"),
        kept=0,
        exact=False,
        needs="torchvision",
    ),
    "ConsisIDPipeline": Joint(
        lambda: _consisid(),
        lambda batch: {
            **texts(batch),
            **video_of(9),
            "guidance_scale": 8.0,
            "max_sequence_length": TOKENS,
            "image": picture(),
            "id_cond": embedded(1, 8, seed=5),
            "id_vit_hidden": [embedded(1, 2, 8, seed=6 + scale) for scale in range(1)],
        },
        prompts=1,
    ),
}

#: All pipelines with joint attention.
EVERY: dict[str, Joint] = {**JOINT, **MORE_JOINT, **VIDEOS}
