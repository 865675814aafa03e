"""More tiny pipelines of the real diffusers classes with cross-attention, for `denoiser_cases.py`."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from PIL import Image

from tests import tiny_siblings, tiny_transformers, tiny_video
from tests.tiny_joint import _vae as image_vae
from tests.tiny_joint import assembled, picture
from tests.tiny_language_models import qwen_3, reader, t5, words
from tests.tiny_pipelines import LATENT_SIZE, SIZE, TEXT_DIM, VELOCITY, image, sdxl, seeded, stable_diffusion
from tests.tiny_siblings import _with, prompts
from tests.tiny_transformers import embedded_prompts

PROMPTS = ["a red cat", "a blue dog"]


def i2vgen_xl() -> Any:
    """Return I2VGen-XL, whose first frame is an input of its own and whose latents are stepped frame by frame."""
    unet = seeded(
        lambda: diffusers.I2VGenXLUNet(
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
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=TEXT_DIM,
    )
    size = {"height": SIZE, "width": SIZE}
    return _with(
        "I2VGenXLPipeline",
        stable_diffusion(layout="small"),
        unet=unet,
        image_encoder=seeded(lambda: transformers.CLIPVisionModelWithProjection(config), 8),
        feature_extractor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        scheduler=DDIMScheduler(**VELOCITY, clip_sample=False),
    )


def i2vgen_xl_call(batch: int = 1) -> dict[str, Any]:
    size = {"num_frames": tiny_video.FRAMES, "height": SIZE, "width": SIZE}
    return {**prompts(batch), **size, "image": picture(SIZE), "clip_skip": None}


def video_to_video() -> Any:
    return _with("VideoToVideoSDPipeline", tiny_siblings.text_to_video())


def frames() -> list[Image.Image]:
    return [picture(SIZE)] * tiny_video.FRAMES


def video_to_video_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "video": frames(), "strength": 1.0}


def animatediff_video() -> Any:
    return _with("AnimateDiffVideoToVideoPipeline", tiny_video.animatediff())


def animatediff_video_call(batch: int = 1) -> dict[str, Any]:
    call = {**prompts(batch), "height": SIZE, "width": SIZE}
    return {**call, "video": frames(), "strength": 1.0}


def ltx_condition() -> Any:
    return _with("LTXConditionPipeline", tiny_siblings.ltx_image_to_video())


def ltx_condition_call(batch: int = 1) -> dict[str, Any]:
    return {**tiny_video.ltx_call(batch), "image": picture(64), "frame_index": 0}


def controlnet_xs(name: str) -> Any:
    """Return a pipeline whose UNet is made of another and a ControlNet-XS."""
    source = sdxl() if "XL" in name else stable_diffusion(layout="small")
    config = {key: value for key, value in source.unet.config.items() if not key.startswith("_")}
    unet = seeded(lambda: diffusers.UNet2DConditionModel(**{**config, "layers_per_block": 2}))  # what it expects
    adapter = seeded(
        lambda: diffusers.ControlNetXSAdapter.from_unet(
            unet, size_ratio=0.5, conditioning_embedding_out_channels=(8, 16), num_attention_heads=2
        ),
        6,
    )
    return _with(name, source, unet=unet, controlnet=adapter)


def controlnet_xs_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), "image": image(batch)}


def stable_audio_3() -> Any:
    vae = seeded(
        lambda: diffusers.AutoencoderSAME(
            audio_channels=1,
            patch_size=4,
            encoder_channels=8,
            encoder_c_mults=[1],
            encoder_strides=[2],
            encoder_transformer_depths=[1],
            latent_dim=8,
            dim_heads=4,
            sampling_rate=160,
        ),
        1,
    )
    transformer = seeded(
        lambda: diffusers.StableAudio3DiTModel(
            io_channels=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            cond_token_dim=TEXT_DIM,
            global_cond_dim=TEXT_DIM,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            ff_mult=1.0,
            num_memory_tokens=4,
        )
    )
    return assembled(
        "StableAudio3Pipeline",
        vae=vae,
        transformer=transformer,
        duration_embedder=seeded(lambda: StableAudio3DurationEmbedder(output_dim=TEXT_DIM, fourier_dim=16), 2),
    )


def stable_audio_3_call(batch: int = 1) -> dict[str, Any]:
    call = embedded_prompts(batch)
    masks = embedded_prompts(batch, masks=True)
    return {
        **call,
        "encoder_attention_mask": masks["prompt_attention_mask"],
        "negative_encoder_attention_mask": masks["negative_prompt_attention_mask"],
        "duration": 0.5,
        "guidance_scale": 7.0,
    }


def longcat_audio() -> Any:
    vae = seeded(
        lambda: diffusers.LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 1],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=16,
        ),
        1,
    )
    transformer = seeded(
        lambda: diffusers.LongCatAudioDiTTransformer(
            dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_DIM, latent_dim=8, text_conv=False, ff_mult=1.0
        )
    )
    parts = {"vae": vae, "text_encoder": t5(), "tokenizer": words(), "transformer": transformer}
    return assembled("LongCatAudioDiTPipeline", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), **parts)


def longcat_audio_call(batch: int = 1) -> dict[str, Any]:
    return {"prompt": PROMPTS[:batch], "negative_prompt": ["dog"] * batch, "audio_duration_s": 1.0}


def sana_sprint() -> Any:
    source = tiny_transformers.sana()
    config = {name: value for name, value in source.transformer.config.items() if not name.startswith("_")}
    config |= {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    transformer = seeded(lambda: diffusers.SanaTransformer2DModel(**config))
    return _with("SanaSprintPipeline", source, transformer=transformer, scheduler=diffusers.SCMScheduler())


def sana_sprint_call(batch: int = 1) -> dict[str, Any]:
    call = {name: value for name, value in tiny_transformers.sana_call(batch).items() if "negative" not in name}
    return {**call, "intermediate_timesteps": None}


def dreamlite() -> Any:
    vae = seeded(
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ),
        1,
    )
    unet = seeded(
        lambda: diffusers.DreamLiteUNetModel(
            sample_size=LATENT_SIZE,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=16,
            use_linear_projection=True,
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
            ff_mult=1,
        )
    )
    pipe = assembled(
        "DreamLiteMobilePipeline", vae=vae, unet=unet, text_encoder=qwen_3(), tokenizer=words(), processor=reader()
    )
    pipe.prompt_template_encode_generate_start_idx = 0
    return pipe


def dreamlite_call(batch: int = 1) -> dict[str, Any]:
    return {"prompt": PROMPTS[0], "height": 64, "width": 64}


# Siblings of pipelines in other modules.


def kandinsky_5(name: str) -> Any:
    source = tiny_siblings.kandinsky_5()
    config = {key: value for key, value in source.transformer.config.items() if not key.startswith("_")}
    config["visual_cond"] = name == "Kandinsky5I2IPipeline"
    transformer = seeded(lambda: diffusers.Kandinsky5Transformer3DModel(**config))
    pipe = _with(name, source, transformer=transformer, vae=image_vae())
    pipe.resolutions = [(32, 48)]  # instead of about 1024 pixels
    return pipe


def kandinsky_5_call(batch: int = 1) -> dict[str, Any]:
    return {key: value for key, value in tiny_siblings.kandinsky_5_call(batch).items() if key != "num_frames"}


def skyreels_image_to_video() -> Any:
    source = tiny_video.wan_image_to_video()
    config = {key: value for key, value in source.transformer.config.items() if not key.startswith("_")}
    expected = inspect.signature(diffusers.SkyReelsV2Transformer3DModel).parameters
    config = {key: value for key, value in config.items() if key in expected}
    transformer = seeded(lambda: diffusers.SkyReelsV2Transformer3DModel(**config))
    return _with("SkyReelsV2ImageToVideoPipeline", source, transformer=transformer)


def lucy_edit() -> Any:
    source = tiny_video.wan_image_to_video()
    return _with("LucyEditPipeline", source, transformer=tiny_video.wan_transformer(in_channels=8))


def lucy_edit_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "video": [picture(32)] * 5, "height": 32, "width": 32, "num_frames": 5}


def stable_audio_3_edit(name: str) -> Any:
    return _with(name, stable_audio_3())


def stable_audio_3_edit_call(batch: int = 1) -> dict[str, Any]:
    call = {key: value for key, value in stable_audio_3_call(batch).items() if not key.startswith("negative_")}
    call.pop("guidance_scale")
    return {**call, "audio": torch.randn(batch, 1, 80, generator=torch.Generator().manual_seed(14))}


def xl_adapter() -> Any:
    adapter = seeded(
        lambda: diffusers.T2IAdapter(
            in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
        ),
        6,
    )
    return _with("StableDiffusionXLAdapterPipeline", sdxl(), adapter=adapter)


def xl_adapter_call(batch: int = 1) -> dict[str, Any]:
    return {**prompts(batch), **tiny_siblings.SIZES, "image": picture(SIZE), "height": SIZE, "width": SIZE}


def animatediff_video_controlnet() -> Any:
    source = tiny_siblings.animatediff_controlnet()
    return _with("AnimateDiffVideoToVideoControlNetPipeline", source)


def animatediff_video_controlnet_call(batch: int = 1) -> dict[str, Any]:
    return {**animatediff_video_call(batch), "conditioning_frames": frames()}


def cosmos_video() -> Any:
    """Return Cosmos' video-to-world pipeline, whose halves see given frames with different noise."""
    vae = seeded(
        lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            scaling_factor=1.0,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            latents_mean=None,
            latents_std=None,
        ),
        1,
    )
    source = tiny_video.cosmos()
    transformer = tiny_video.cosmos_transformer(in_channels=5)  # the latents, and the mask of given frames
    return _with("CosmosVideoToWorldPipeline", source, vae=vae, transformer=transformer)


def cosmos_video_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "image": picture(32), "height": 32, "width": 32, "num_frames": 9}
