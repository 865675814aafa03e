"""Tiny pipelines of the real diffusers classes besides Stable Diffusion and PixArt, for images and sound.

Their text encoders (T5, ChatGLM, Gemma) have no useful tiny form, so prompts are passed as embeddings. If the
VAE is also omitted, the tests compare latents; diffusers allows both to be None.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)

from tests.tiny_pipelines import LATENT_SIZE, SIZE, TEXT_DIM, VELOCITY, seeded

TOKENS = 6


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embedded(batch: int, *shape: int, seed: int) -> torch.Tensor:
    """Return random text embeddings; the rows of a smaller batch are the first rows of a larger one."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(100 * seed + row)) for row in range(batch)]
    )


def embedded_prompts(batch: int, *, masks: bool = False, dim: int = TEXT_DIM, suffix: str = "") -> dict[str, Any]:
    """Return embedded prompts and negative prompts and, with `masks`, masks with fewer tokens for the negative ones."""
    seed = 3 if suffix else 1
    call: dict[str, Any] = {
        f"prompt_embeds{suffix}": embedded(batch, TOKENS, dim, seed=seed),
        f"negative_prompt_embeds{suffix}": embedded(batch, TOKENS, dim, seed=seed + 1),
    }
    if masks:
        mask, negative = torch.ones(2, batch, TOKENS, dtype=torch.long)
        mask[:, -2:] = 0
        negative[:, 2:] = 0
        call |= {f"prompt_attention_mask{suffix}": mask, f"negative_prompt_attention_mask{suffix}": negative}
    return call


# Images.


def kolors() -> Any:
    """Return Kolors: SDXL's UNet with a projection of a language model's hidden states to its text dimension."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            attention_head_dim=4,
            use_linear_projection=True,
            cross_attention_dim=48,
            encoder_hid_dim=TEXT_DIM,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_DIM + 6 * 8,
        )
    )
    scheduler = EulerDiscreteScheduler(**VELOCITY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # when its text encoder is imported
        from diffusers import KolorsPipeline
    pipe = KolorsPipeline(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler)
    return silent(pipe)


def kolors_call(batch: int = 1) -> dict[str, Any]:
    return {
        **embedded_prompts(batch),
        "pooled_prompt_embeds": embedded(batch, TEXT_DIM, seed=5),
        "negative_pooled_prompt_embeds": embedded(batch, TEXT_DIM, seed=6),
        "negative_original_size": (256, 128),
        "negative_target_size": (8, 64),
    }


def hunyuan_dit() -> Any:
    transformer = seeded(
        lambda: HunyuanDiT2DModel(
            sample_size=LATENT_SIZE,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            hidden_size=24,
            cross_attention_dim=TEXT_DIM,
            cross_attention_dim_t5=TEXT_DIM,
            pooled_projection_dim=16,
            text_len=TOKENS,
            text_len_t5=TOKENS,
        )
    )
    pipe = HunyuanDiTPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=DDPMScheduler(**VELOCITY),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return silent(pipe)


def hunyuan_dit_call(batch: int = 1) -> dict[str, Any]:
    return {
        **embedded_prompts(batch, masks=True),
        **embedded_prompts(batch, masks=True, suffix="_2"),
        "use_resolution_binning": False,
        "original_size": (64, 48),
        "height": 8 * LATENT_SIZE,
        "width": 8 * LATENT_SIZE,
    }


def sana() -> Any:
    """Return Sana, whose self-attention is linear: no softmax, and no fused attention node in the graph."""
    transformer = seeded(
        lambda: SanaTransformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_DIM,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SanaPipeline(vae=None, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=scheduler)
    return silent(pipe)


def sana_call(batch: int = 1) -> dict[str, Any]:
    return {
        **embedded_prompts(batch, masks=True),
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 32 * 4,
        "width": 32 * 4,
    }


def lumina() -> Any:
    transformer = seeded(
        lambda: LuminaNextDiT2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=TEXT_DIM,
        )
    )
    with torch.no_grad():
        for layer in transformer.layers:
            layer.gate.fill_(0.5)  # the cross-attention's gate, which is zero in a new model
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LuminaPipeline(vae=None, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=scheduler)
    return silent(pipe)


def lumina_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch, masks=True), "height": 8 * LATENT_SIZE, "width": 8 * LATENT_SIZE}


def stable_diffusion_3() -> Any:
    """Return Stable Diffusion 3, which has joint attention over text and latents, and no cross-attention."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=TEXT_DIM,
            out_channels=4,
        )
    )
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(encoders))
    return silent(pipe)


# Sound.


def stable_audio(sample_size: int = SIZE) -> Any:
    transformer = seeded(
        lambda: StableAudioDiTModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=16,
            cross_attention_input_dim=16,
            global_states_input_dim=32,
            time_proj_dim=8,
        )
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        vae = seeded(
            lambda: AutoencoderOobleck(
                encoder_hidden_size=6,
                downsampling_ratios=[1, 2],
                decoder_channels=3,
                decoder_input_channels=4,
                audio_channels=2,
                channel_multiples=[2, 4],
                sampling_rate=4,
            ),
            1,
        )
    projection = seeded(
        lambda: StableAudioProjectionModel(text_encoder_dim=TEXT_DIM, conditioning_dim=16, min_value=0, max_value=32), 2
    )
    pipe = StableAudioPipeline(
        vae=vae,
        text_encoder=None,
        projection_model=projection,
        tokenizer=None,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
    return silent(pipe)


def stable_audio_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "audio_end_in_s": 4.0}


def stable_audio_call_without_negative_prompt(batch: int = 1) -> dict[str, Any]:
    """Return call arguments for which the pipeline uses zeros as the negative half."""
    return {"prompt_embeds": embedded(batch, TOKENS, TEXT_DIM, seed=1), "audio_end_in_s": 4.0}
