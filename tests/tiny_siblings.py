"""Tiny pipelines with the denoisers of those in the other `tiny_` modules, but other inputs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderKLLTXVideo,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    Kandinsky5Transformer3DModel,
    SanaVideoTransformer3DModel,
    UNet3DConditionModel,
    WanVACETransformer3DModel,
)

from tests import tiny_transformers, tiny_video
from tests.tiny_pipelines import (
    LATENT_SIZE,
    PROMPTS,
    SIZE,
    TEXT_DIM,
    VELOCITY,
    image,
    mask,
    sdxl,
    seeded,
    stable_diffusion,
)
from tests.tiny_transformers import TOKENS, embedded, embedded_prompts, silent

NEGATIVE = ["dog", "snow"]
#: SDXL's sizes, different for the two halves, so that using the wrong half shows.
SIZES = {"negative_original_size": (256, 128), "negative_target_size": (8, 64)}


def prompts(batch: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[:batch], "negative_prompt": NEGATIVE[:batch]}


def _with(name: str, source: Any, **components: Any) -> Any:
    """Return the pipeline class `name` with the components of `source` that it takes, and `components`."""
    cls = getattr(diffusers, name)
    expected, optional = cls._get_signature_keys(cls)
    parts = {key: value for key, value in source.components.items() if key in expected}
    options = {"requires_safety_checker": False, "add_watermarker": False}
    return silent(cls(**{**parts, **components}, **{key: options[key] for key in options if key in optional}))


# Stable Diffusion and SDXL.


def _controlnet(unet: Any, cls: Any = ControlNetModel) -> Any:
    return seeded(lambda: cls.from_unet(unet, conditioning_embedding_out_channels=(8, 16)), 6)


def controlnet(name: str) -> Any:
    source = stable_diffusion(layout="small")
    return _with(name, source, controlnet=_controlnet(source.unet))


def controlnet_xl(name: str) -> Any:
    source = sdxl()
    return _with(name, source, controlnet=_controlnet(source.unet))


def controlnet_img2img_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "image": image(batch), "control_image": image(batch), "strength": 1.0}


def controlnet_inpaint_call(batch: int = 1) -> dict[str, Any]:
    return {**controlnet_img2img_call(batch), "mask_image": mask(), "height": SIZE, "width": SIZE}


def controlnet_xl_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "image": image(batch), **SIZES}


def controlnet_union_xl() -> Any:
    source = sdxl()
    config = {
        "cross_attention_dim": 2 * TEXT_DIM,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (4, 8),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_DIM + 6 * 8,
        "conditioning_embedding_out_channels": (8, 16),
        "num_trans_channel": 32,
        "num_trans_head": 2,
        "num_proj_channel": 32,
    }
    return _with(
        "StableDiffusionXLControlNetUnionPipeline",
        source,
        controlnet=seeded(lambda: ControlNetUnionModel(**config), 6),
    )


def controlnet_union_xl_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "control_image": [image(batch)], "control_mode": [0], **SIZES}


def upscale() -> Any:
    source = stable_diffusion(layout="small", in_channels=7, num_class_embeds=100)
    source.vae.register_to_config(scaling_factor=0.08333)  # its checkpoint's; others cause a warning
    return _with("StableDiffusionUpscalePipeline", source, low_res_scheduler=DDPMScheduler(), watermarker=None)


def upscale_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "image": image(batch, LATENT_SIZE)}


# Video.


def animatediff_controlnet() -> Any:
    source = tiny_video.animatediff()
    unet = stable_diffusion(layout="small").unet
    return _with("AnimateDiffControlNetPipeline", source, controlnet=_controlnet(unet), motion_adapter=None)


def animatediff_controlnet_call(batch: int = 1) -> dict[str, Any]:
    frames = image(tiny_video.FRAMES)
    return {**tiny_video.animatediff_call(batch), "conditioning_frames": list(frames[:, None])}


def text_to_video() -> Any:
    source = stable_diffusion(layout="small")
    unet = seeded(
        lambda: UNet3DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock3D",),
            up_block_types=("UpBlock3D",),
            attention_head_dim=4,
            cross_attention_dim=TEXT_DIM,
        )
    )
    scheduler = DDIMScheduler(**VELOCITY, clip_sample=False)
    return _with("TextToVideoSDPipeline", source, unet=unet, scheduler=scheduler)


def text_to_video_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "num_frames": tiny_video.FRAMES, "height": SIZE, "width": SIZE}


def ltx_image_to_video() -> Any:
    source = tiny_video.ltx()
    vae = seeded(
        lambda: AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        1,
    )
    return _with("LTXImageToVideoPipeline", source, vae=vae)


def ltx_image_to_video_call(batch: int = 1) -> dict[str, Any]:
    return {**tiny_video.ltx_call(batch), "image": image(batch, 64)}


def sana_video() -> Any:
    transformer = seeded(
        lambda: SanaVideoTransformer3DModel(
            sample_size=LATENT_SIZE,
            patch_size=(1, 2, 2),
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=TEXT_DIM,
            rope_max_seq_len=32,
        )
    )
    pipe = diffusers.SanaVideoPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )
    return silent(pipe)


def sana_video_call(batch: int = 1) -> dict[str, Any]:
    return {
        **embedded_prompts(batch, masks=True),
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 32,
        "width": 32,
        "frames": 5,
    }


def hunyuan_dit_controlnet() -> Any:
    source = tiny_transformers.hunyuan_dit()
    config = source.transformer.config
    keys = (
        "sample_size", "patch_size", "attention_head_dim", "num_attention_heads", "in_channels", "hidden_size",
        "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim", "text_len", "text_len_t5",
    )  # fmt: skip
    controlnet = seeded(
        lambda: HunyuanDiT2DControlNetModel(**{key: config[key] for key in keys}, transformer_num_layers=2), 6
    )
    vae = stable_diffusion(layout="small").vae
    return _with("HunyuanDiTControlNetPipeline", source, vae=vae, controlnet=controlnet)


def hunyuan_dit_controlnet_call(batch: int = 1) -> dict[str, Any]:
    size = {"height": SIZE, "width": SIZE, "control_image": image(batch)}
    return {**tiny_transformers.hunyuan_dit_call(batch), **size}


def wan_vace() -> Any:
    transformer = seeded(lambda: WanVACETransformer3DModel(**tiny_video.WAN, vace_layers=[0], vace_in_channels=72))
    source = tiny_video.wan_image_to_video()
    return _with("WanVACEPipeline", source, transformer=transformer)


def allegro() -> Any:
    """Return Allegro, whose position tables are call arguments, here with as many rows as the batch."""
    transformer = seeded(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=24,
            caption_channels=TEXT_DIM,
            sample_height=LATENT_SIZE,
            sample_width=LATENT_SIZE,
            sample_frames=tiny_video.FRAMES,
        )
    )
    scheduler = EulerAncestralDiscreteScheduler(**VELOCITY)
    pipe = diffusers.AllegroPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    return silent(pipe)


def allegro_call(batch: int = 1) -> dict[str, Any]:
    size = {"num_frames": tiny_video.FRAMES, "height": 8 * LATENT_SIZE, "width": 8 * LATENT_SIZE}
    return {**embedded_prompts(batch, masks=True), "negative_prompt": None, **size}


def anyflow() -> Any:
    """Return AnyFlow: Wan's blocks with both guidance halves in one call, and a second timestep, the target."""
    pipe = diffusers.AnyFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=seeded(lambda: diffusers.AnyFlowTransformer3DModel(**tiny_video.WAN)),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )
    return silent(pipe)


def anyflow_call(batch: int = 1) -> dict[str, Any]:
    return {**tiny_video.wan_call(batch), "guidance_scale": 3.0}


def wan_video_to_video() -> Any:
    source = tiny_video.wan_image_to_video()
    return _with(
        "WanVideoToVideoPipeline",
        source,
        transformer=tiny_video.wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_video_to_video_call(batch: int = 1) -> dict[str, Any]:
    frames = list(image(5, 32))
    return {**embedded_prompts(batch), "video": [frames] * batch, "height": 32, "width": 32, "strength": 1.0}


def cosmos_2_video() -> Any:
    source = tiny_video.cosmos_2()
    vae = tiny_video.wan_image_to_video().vae
    transformer = tiny_video.cosmos_transformer(in_channels=5)  # the latents, and the mask of given frames
    return _with("Cosmos2VideoToWorldPipeline", source, vae=vae, transformer=transformer)


def cosmos_2_video_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "image": image(1, 32), "height": 32, "width": 32, "num_frames": 5}


def kandinsky_5() -> Any:
    transformer = seeded(
        lambda: Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=TEXT_DIM,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        )
    )
    pipe = diffusers.Kandinsky5T2VPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return silent(pipe)


def kandinsky_5_call(batch: int = 1) -> dict[str, Any]:
    lengths = torch.arange(batch + 1, dtype=torch.int32) * TOKENS
    return {
        "prompt_embeds_qwen": embedded(batch, TOKENS, TEXT_DIM, seed=1),
        "negative_prompt_embeds_qwen": embedded(batch, TOKENS, TEXT_DIM, seed=2),
        "prompt_embeds_clip": embedded(batch, 16, seed=3),
        "negative_prompt_embeds_clip": embedded(batch, 16, seed=4),
        "prompt_cu_seqlens": lengths,
        "negative_prompt_cu_seqlens": lengths,
        "height": 32,
        "width": 48,
        "num_frames": 5,
    }
