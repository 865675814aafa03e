"""Tiny pipelines with joint attention that animate an image or follow a video; see `tiny_joint.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from tests.tiny_joint import (
    _BATCH,
    _GUIDER,
    JOINT,
    SIDE,
    Joint,
    _cogvideo,
    _cogvideo_vae,
    _hunyuan_vae,
    _hunyuan_video_call,
    _ltx_2,
    _magvit,
    _of,
    _two_encoders_call,
    _wan_vae,
    _with,
    picture,
    texts,
    video_of,
)
from tests.tiny_language_models import picture_reader, siglip
from tests.tiny_pipelines import seeded
from tests.tiny_transformers import TOKENS


@functools.cache
def hunyuan_video_vae() -> Any:
    downs, ups = ("HunyuanVideoDownBlock3D",) * 4, ("HunyuanVideoUpBlock3D",) * 4
    return seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=downs,
            up_block_types=ups,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        1,
    )


def _hunyuan_15() -> Any:
    parts = {"vae": _hunyuan_vae, "image_encoder": siglip, "feature_extractor": picture_reader, **_GUIDER}
    config = {"target_size": 16, "task_type": "i2v"}
    pipe = _of("HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15Transformer3DModel", parts=parts, **config)()
    pipe.vision_num_semantic_tokens = 4
    return pipe


def clip(frames: int) -> torch.Tensor:
    """Return a video, [1, channels, frames, height, width], with values between 0 and 1."""
    return torch.rand(1, 3, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(12))


def _left(frames: int) -> torch.Tensor:
    """Return the mask of the left half of a video."""
    mask = torch.zeros(1, 1, frames, SIDE, SIDE)
    mask[..., : SIDE // 2] = 255
    return mask


def _easy_animate(name: str, channels: int, **config: Any) -> Callable[[], Any]:
    return _of(name, "EasyAnimateTransformer3DModel", parts={"vae": _magvit}, in_channels=channels, **config)


def _without_image(batch: int) -> dict[str, Any]:
    return {**texts(batch, masks="{}_attention_mask"), **video_of(5), "guidance_scale": 8.0}


_LTX_2 = JOINT["LTX2Pipeline"]
_SIGMAS = [0.9, 0.7, 0.4]


def _unguided(batch: int) -> dict[str, Any]:
    call = texts(batch, masks="{}_attention_mask", mask=torch.long)
    return {name: value for name, value in call.items() if not name.startswith("negative_")}


def _condition() -> Any:
    return LTX2VideoCondition(picture(), crf=0)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(13))


def _dfr() -> Any:
    return _ltx_2("LTX2DFRPipeline", use_keyframes_abs_pos_embedding=True)


def _dfr_refine() -> Any:
    upsampler = seeded(
        lambda: LTX2LatentUpsamplerModel(
            in_channels=8,
            mid_channels=32,
            num_blocks_per_stage=1,
            spatial_upsample=False,
            temporal_upsample=True,
        ),
        9,
    )
    pipe = _ltx_2("LTX2DFRTemporalRefinePipeline", use_keyframes_abs_pos_embedding=True)
    pipe.register_modules(
        temporal_latent_upsampler=upsampler, scheduler=diffusers.LTXEulerAncestralRFScheduler(eta=0.5)
    )
    return pipe


_AUDIO = ("audio_timestep", "audio_sigma")


def _ltx(name: str, *halved: str, **more: Any) -> Joint:
    return Joint(
        lambda: _ltx_2(name), _with(_LTX_2.call, **more), halved=(*_LTX_2.halved, *halved), further=True, prompts=1
    )


VIDEOS: dict[str, Joint] = {
    "CogVideoXFunControlPipeline": Joint(
        lambda: _cogvideo("CogVideoXFunControlPipeline", in_channels=8, vae=_cogvideo_vae()),
        lambda batch: {
            **texts(batch),
            "height": SIDE,
            "width": SIDE,
            "guidance_scale": 8.0,
            "max_sequence_length": TOKENS,
            "control_video": [picture()] * 9,
        },
        prompts=1,
    ),
    "EasyAnimateInpaintPipeline": Joint(
        _easy_animate("EasyAnimateInpaintPipeline", 12, resize_inpaint_mask_directly=False),
        _with(_without_image, video=lambda: clip(5), mask_video=lambda: _left(5), strength=1.0),
        halved=(*_BATCH, "inpaint_latents"),
        prompts=1,
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Joint(
        _of(
            "HunyuanSkyreelsImageToVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            parts={"vae": hunyuan_video_vae},
            in_channels=8,
        ),
        _with(_hunyuan_video_call, image=picture),
        "calls",
        prompts=1,
    ),
    "HunyuanVideoImageToVideoPipeline": Joint(
        _of(
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            parts={"vae": hunyuan_video_vae},
            image_condition_type="token_replace",
        ),
        _with(_hunyuan_video_call, image=picture),
        "calls",
        prompts=1,
    ),
    "HunyuanVideo15ImageToVideoPipeline": Joint(
        _hunyuan_15,
        lambda batch: {**_two_encoders_call(batch), "num_frames": 5, "image": picture()},
        "calls",
    ),
    "MotifVideoImage2VideoPipeline": Joint(
        _of("MotifVideoImage2VideoPipeline", "MotifVideoTransformer3DModel", parts={**_GUIDER, "vae": _wan_vae}),
        lambda batch: {**texts(batch, masks="{}_attention_mask"), **video_of(5), "image": picture(), "prompt": None},
        "calls",
        prompts=1,
    ),
    "LTX2ImageToVideoPipeline": _ltx("LTX2ImageToVideoPipeline", "audio_timestep", image=picture, image_crf=0),
    "LTX2ConditionPipeline": _ltx(
        "LTX2ConditionPipeline", *_AUDIO, conditions=lambda: [LTX2VideoCondition(picture(), index=1, crf=0)]
    ),
    "LTX2InContextPipeline": _ltx(
        "LTX2InContextPipeline",
        *_AUDIO,
        conditions=lambda: [LTX2VideoCondition(picture(), crf=0)],
        reference_conditions=lambda: [LTX2ReferenceCondition([picture()] * 9)],
    ),
    "LTX2DFRPipeline": Joint(
        _dfr,
        lambda batch: {**_unguided(batch), **video_of(9), "sigmas": _SIGMAS, "conditions": [_condition()]},
        "none",
        prompts=1,
    ),
    "LTX2DFRTemporalRefinePipeline": Joint(
        _dfr_refine,
        lambda batch: {
            **_unguided(batch),
            **video_of(9),
            "sigmas": _SIGMAS,
            "latents": _noise(1, 8, 5, 4, 4),
            "keyframes_latents": _noise(1, 8, 2, 4, 4),
            "keyframe_positions": [4, 8],
            "audio_latents": _noise(1, 2, 10, 2),
        },
        "none",
        prompts=1,
    ),
    "LTX2HDRPipeline": _ltx(
        "LTX2HDRPipeline",
        *_AUDIO,
        reference_conditions=lambda: [LTX2HDRReferenceCondition([picture()] * 9)],
        stg_scale=1.0,
        modality_scale=3.0,
    ),
}
