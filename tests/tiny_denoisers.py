"""A tiny configuration and a real first call of every denoiser class of diffusers, for `denoiser_map.py`.

Where a tiny pipeline exists, its own call makes the denoiser's inputs; the others are made by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel

from tests import tiny_pipelines, tiny_video
from tests.denoiser_cases import CASES, SIBLINGS
from tests.tiny_joint import CONFIGS, ROPE
from tests.tiny_joint_siblings import EVERY
from tests.tiny_pipelines import LATENT_SIZE, TEXT_DIM, seeded
from tests.tiny_transformers import TOKENS

#: A denoiser with the arguments of a call of it.
FirstCall = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


class _Called(BaseException):
    """Leaves a pipeline at the first call of its denoiser."""


def of_pipeline(pipe: Any, call: Mapping[str, Any], name: str = "transformer") -> FirstCall:
    """Return the first denoiser call of `pipe(**call)`."""
    denoiser = getattr(pipe, name)
    given: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        given.extend([args, kwargs])
        raise _Called

    signature = inspect.signature(denoiser.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    denoiser.forward = forward
    try:
        pipe(num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0), **call)
    except _Called:
        pass
    finally:
        del denoiser.forward
    return denoiser, given[0], given[1]


def _joint(name: str) -> Callable[[], FirstCall]:
    return lambda: of_pipeline(EVERY[name].build(), EVERY[name].call(1))


def _without(make: Callable[[], FirstCall], *names: str) -> FirstCall:
    """Return the first call without some of its arguments."""
    denoiser, args, kwargs = make()
    return denoiser, args, {name: value for name, value in kwargs.items() if name not in names}


def _case(name: str) -> Callable[[], FirstCall]:
    case = {**CASES, **SIBLINGS}[name]
    return lambda: of_pipeline(case.build(), case.call(1), case.denoisers[0])


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _text(dim: int = TEXT_DIM, tokens: int = TOKENS) -> torch.Tensor:
    return _random(1, tokens, dim, seed=7)


def _direct(name: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Callable[[], FirstCall]:
    """Return a function that makes the class `name` and its inputs."""

    def make() -> FirstCall:
        cls = getattr(diffusers, name, None) or getattr(diffusers.pipelines, name)
        return seeded(lambda: cls(**{**CONFIGS.get(name, {}), **config})), (), inputs()

    return make


_NOW = torch.tensor([500.0])
_WAN = {key: value for key, value in tiny_video.WAN.items() if key != "rope_max_seq_len"}


def _video_call() -> dict[str, Any]:
    return {"hidden_states": _random(1, 4, 2, 8, 8), "timestep": _NOW, "encoder_hidden_states": _text()}


def _history() -> dict[str, Any]:
    return {
        **_video_call(),
        "indices_hidden_states": torch.ones(1, 2),
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": _random(1, 4, 1, 8, 8, seed=1),
        "latents_history_mid": _random(1, 4, 1, 8, 8, seed=2),
        "latents_history_long": _random(1, 4, 4, 8, 8, seed=3),
    }


def _framepack() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 3, 4, 4),
        "timestep": _NOW,
        "encoder_hidden_states": _text(),
        "pooled_projections": _random(1, 16, seed=1),
        "encoder_attention_mask": torch.ones(1, TOKENS),
        "guidance": torch.tensor([6000.0]),
        "image_embeds": _random(1, 5, 16, seed=2),
        "indices_latents": torch.ones(3),
        "latents_clean": _random(1, 4, 2, 4, 4, seed=3),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": _random(1, 4, 2, 4, 4, seed=4),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": _random(1, 4, 8, 4, 4, seed=5),
        "indices_latents_history_4x": torch.ones(8),
    }


def _ideogram() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    total = TOKENS + 4
    latents, text = torch.zeros(1, total, 16), torch.zeros(1, total, TEXT_DIM)
    latents[:, TOKENS:] = _random(1, 4, 16)
    text[:, :TOKENS] = _text()
    positions = torch.arange(total).view(1, total, 1).repeat(1, 1, 3)
    positions[:, TOKENS:] = IMAGE_POSITION_OFFSET + torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    indicator = torch.full((1, total), LLM_TOKEN_INDICATOR)
    indicator[:, TOKENS:] = OUTPUT_IMAGE_INDICATOR
    return {
        "hidden_states": latents,
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": text,
        "position_ids": positions,
        "segment_ids": torch.ones(1, total, dtype=torch.long),
        "indicator": indicator,
    }


def _cosmos_3() -> dict[str, Any]:
    length = 2 + 16
    places = torch.arange(2, length)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.arange(length).repeat(3, 1),
        "und_len": 2,
        "sequence_length": length,
        "vision_tokens": [_random(1, 2, 1, 4, 4)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.ones(16),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _minimax_h3() -> dict[str, Any]:
    video, audio = 8, 4
    total = TOKENS + audio + video
    text, sound = torch.arange(TOKENS), torch.arange(TOKENS, TOKENS + audio)
    seen = torch.arange(TOKENS + audio, total)
    tags = torch.zeros(total, dtype=torch.long)
    tags[text], tags[sound] = 1, 2
    steps = torch.zeros(total, dtype=torch.long)
    steps[sound] = 1
    return {
        "hidden_states": _random(1, video, 16),
        "audio_hidden_states": _random(1, audio, 6, seed=1),
        "encoder_hidden_states": _text(8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": steps,
        "token_tags": tags,
        "position_ids": torch.arange(total, dtype=torch.float32).view(-1, 1).repeat(1, 3),
        "video_indices": seen,
        "audio_indices": sound,
        "text_indices": text,
    }


def _ltx_2() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 2 * 4 * 4, 8),
        "audio_hidden_states": _random(1, 9, 8, seed=1),
        "encoder_hidden_states": _text(),
        "audio_encoder_hidden_states": _random(1, TOKENS, TEXT_DIM, seed=8),
        "timestep": _NOW,
        "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _omnigen() -> dict[str, Any]:
    """Return inputs whose mask is the one that the pipeline makes: causal, with the image after the text."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    total = TOKENS + 1 + 16
    mask, _ = OmniGenCollator().create_mask(torch.ones(1, TOKENS, dtype=torch.long), [16])
    return {
        "hidden_states": _random(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.arange(1, TOKENS + 1)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(total)[None],
    }


def _bria_fibo() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 16, 16),
        "timestep": _NOW,
        "encoder_hidden_states": _text(),
        "text_encoder_layers": [_random(1, TOKENS, 16, seed=seed) for seed in range(4)],
        "img_ids": torch.arange(48.0).view(16, 3),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def _glm() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 8, 8),
        "encoder_hidden_states": _text(),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": _NOW,
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def _flux_3() -> dict[str, Any]:
    positions = torch.zeros(16, 4)
    positions[..., 1], positions[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
    words = torch.zeros(TOKENS, 4)
    words[..., 3] = torch.arange(TOKENS)
    return {
        "hidden_states": _random(1, 16, 16),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5]),
        "img_ids": positions,
        "txt_ids": words,
    }


def _animate() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 12, 21, 8, 8),
        "timestep": _NOW,
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_image": _random(1, 12, TEXT_DIM, seed=1),
        "pose_hidden_states": _random(1, 4, 20, 8, 8, seed=2),
        "face_pixel_values": _random(1, 3, 77, 16, 16, seed=3),
    }


def _animate_2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [_random(4, 2, 8, 8)],
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": [_random(TOKENS, TEXT_DIM, seed=1)],
        "condition_latents": [_random(8, 2, 8, 8, seed=2)],
        "encoder_hidden_states_image": _random(1, 257, 1280, seed=3),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 32,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
    }


def _ace_step() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 8, 8),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": _text(),
        "context_latents": _random(1, 8, 16, seed=1),
    }


def _audio() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 16, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        "attention_mask": torch.ones(1, 16, dtype=torch.bool),
    }


def _unet(**more: Any) -> dict[str, Any]:
    return {
        "sample": _random(1, 4, LATENT_SIZE, LATENT_SIZE),
        "timestep": _NOW,
        "encoder_hidden_states": _text(),
        **more,
    }


_SMALL_UNET: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 4,
}

#: How to make the first call of each class. Classes of several pipelines are taken from the most usual one.
FIRST_CALLS: dict[str, Callable[[], FirstCall]] = {
    # Pipelines with joint attention.
    "AuraFlowTransformer2DModel": _joint("AuraFlowPipeline"),
    "BriaFibo2Transformer2DModel": _joint("BriaFibo2Pipeline"),
    "BriaTransformer2DModel": _joint("BriaPipeline"),
    "ChromaTransformer2DModel": _joint("ChromaPipeline"),
    "CogVideoXTransformer3DModel": _joint("CogVideoXPipeline"),
    "CogView3PlusTransformer2DModel": _joint("CogView3PlusPipeline"),
    "CogView4Transformer2DModel": _joint("CogView4Pipeline"),
    "ConsisIDTransformer3DModel": _joint("ConsisIDPipeline"),
    "EasyAnimateTransformer3DModel": _joint("EasyAnimatePipeline"),
    "ErnieImageTransformer2DModel": _joint("ErnieImagePipeline"),
    "Flux2Transformer2DModel": _joint("Flux2KleinPipeline"),
    "FluxTransformer2DModel": _joint("FluxPipeline"),
    "GlmImageTransformer2DModel": _direct("GlmImageTransformer2DModel", _glm),
    "HiDreamImageTransformer2DModel": _joint("HiDreamImagePipeline"),
    "HunyuanImageTransformer2DModel": _joint("HunyuanImagePipeline"),
    "HunyuanVideo15Transformer3DModel": _joint("HunyuanVideo15Pipeline"),
    "HunyuanVideoTransformer3DModel": _joint("HunyuanVideoPipeline"),
    "JoyImageEditPlusTransformer3DModel": _direct(
        "JoyImageEditPlusTransformer3DModel",
        lambda: {
            "hidden_states": _random(1, 16, 4, 1, 2, 2),
            "timestep": _NOW,
            "encoder_hidden_states": _text(),
            "encoder_hidden_states_mask": torch.ones(1, TOKENS, dtype=torch.bool),
            "shape_list": [[(1, 4, 4)]],
        },
    ),
    "JoyImageEditTransformer3DModel": _joint("JoyImageEditPipeline"),
    "Kandinsky6Transformer3DModel": _joint("Kandinsky6TI2VAPipeline"),
    "Krea2Transformer2DModel": _joint("Krea2Pipeline"),
    "LongCatImageTransformer2DModel": _direct(
        "LongCatImageTransformer2DModel",
        lambda: {key: value for key, value in _bria_fibo().items() if key != "text_encoder_layers"},
    ),
    "Lumina2Transformer2DModel": _joint("Lumina2Pipeline"),
    "MochiTransformer3DModel": _joint("MochiPipeline"),
    "MotifVideoTransformer3DModel": _joint("MotifVideoPipeline"),
    "NucleusMoEImageTransformer2DModel": _joint("NucleusMoEImagePipeline"),
    "OvisImageTransformer2DModel": _joint("OvisImagePipeline"),
    "PRXTransformer2DModel": _joint("PRXPipeline"),
    "QwenImage21Transformer2DModel": lambda: _without(_joint("QwenImage21Pipeline"), "kv_cache", "kv_cache_mode"),
    "QwenImageTransformer2DModel": _joint("QwenImagePipeline"),
    "SD3Transformer2DModel": _joint("StableDiffusion3Pipeline"),
    "ZImageTransformer2DModel": _joint("ZImagePipeline"),
    # Pipelines with cross-attention.
    "AllegroTransformer3DModel": _case("AllegroPipeline"),
    "AnyFlowTransformer3DModel": _case("AnyFlowPipeline"),
    "CosmosTransformer3DModel": _case("CosmosTextToWorldPipeline"),
    "HunyuanDiT2DModel": _case("HunyuanDiTPipeline"),
    "I2VGenXLUNet": _case("I2VGenXLPipeline"),
    "Kandinsky5Transformer3DModel": _case("Kandinsky5T2VPipeline"),
    "LTXVideoTransformer3DModel": _case("LTXPipeline"),
    "LatteTransformer3DModel": _case("LattePipeline"),
    "LuminaNextDiT2DModel": _case("LuminaPipeline"),
    "PixArtTransformer2DModel": lambda: of_pipeline(tiny_pipelines.pixart(), tiny_pipelines.pixart_prompt()),
    "SanaTransformer2DModel": _case("SanaPipeline"),
    "SanaVideoTransformer3DModel": _case("SanaVideoPipeline"),
    "SkyReelsV2Transformer3DModel": _case("SkyReelsV2Pipeline"),
    "StableAudioDiTModel": _case("StableAudioPipeline"),
    "UNet2DConditionModel": lambda: of_pipeline(tiny_pipelines.stable_diffusion(), {"prompt": "red cat"}, "unet"),
    "UNet3DConditionModel": _case("TextToVideoSDPipeline"),
    "UNetMotionModel": _case("AnimateDiffPipeline"),
    "UNetSpatioTemporalConditionModel": _case("StableVideoDiffusionPipeline"),
    "WanTransformer3DModel": _case("WanPipeline"),
    "WanVACETransformer3DModel": _case("WanVACEPipeline"),
    # Inputs made by hand.
    "AceStepTransformer1DModel": _direct(
        "AceStepTransformer1DModel",
        _ace_step,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=16,
    ),
    "AnyFlowFARTransformer3DModel": _direct(
        "AnyFlowFARTransformer3DModel",
        lambda: {
            "hidden_states": _random(1, 4, 4, 8, 8),
            "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "encoder_hidden_states": _text(),
            "chunk_partition": [2, 2],
        },
        **tiny_video.WAN,
    ),
    "BriaFiboTransformer2DModel": _direct("BriaFiboTransformer2DModel", _bria_fibo),
    "ChronoEditTransformer3DModel": _direct("ChronoEditTransformer3DModel", _video_call, **tiny_video.WAN),
    "Cosmos3OmniTransformer": _direct(
        "Cosmos3OmniTransformer",
        _cosmos_3,
        head_dim=6,
        hidden_size=12,
        intermediate_size=24,
        latent_channel=2,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=2,
        rope_axes_dim=[1, 1, 1],
        vocab_size=32,
    ),
    "Flux3Transformer2DModel": _direct(
        "Flux3Transformer2DModel",
        _flux_3,
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        timestep_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    "HeliosTransformer3DModel": _direct("HeliosTransformer3DModel", _history, **_WAN, rope_dim=(4, 4, 4)),
    "HunyuanVideoFramepackTransformer3DModel": _direct("HunyuanVideoFramepackTransformer3DModel", _framepack),
    "Ideogram4Transformer2DModel": _direct("Ideogram4Transformer2DModel", _ideogram),
    "LTX2VideoTransformer3DModel": _direct("LTX2VideoTransformer3DModel", _ltx_2),
    "LongCatAudioDiTTransformer": _direct(
        "LongCatAudioDiTTransformer",
        _audio,
        dit_dim=32,
        dit_depth=2,
        dit_heads=2,
        dit_text_dim=TEXT_DIM,
        latent_dim=8,
        text_conv=False,
    ),
    "MiniMaxH3Transformer3DModel": _direct(
        "MiniMaxH3Transformer3DModel",
        _minimax_h3,
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=6,
        text_dim=8,
        freq_dim=8,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    ),
    "MiniMaxMusic3Transformer1DModel": _direct(
        "MiniMaxMusic3Transformer1DModel",
        lambda: {
            "hidden_states": _random(1, 8, 24),
            "encoder_hidden_states": _random(1, 24, 16, seed=1),
            "timestep": torch.tensor([0.5]),
        },
        in_channels=8,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=8,
    ),
    "OmniGenTransformer2DModel": _direct("OmniGenTransformer2DModel", _omnigen),
    "WanAnimateTransformer3DModel": _direct(
        "WanAnimateTransformer3DModel",
        _animate,
        **{**tiny_video.WAN, "in_channels": 12},
        latent_channels=4,
        image_dim=TEXT_DIM,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
    # Without text.
    "DiTTransformer2DModel": _direct(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": _random(1, 4, 8, 8),
            "timestep": torch.tensor([5]),
            "class_labels": torch.tensor([1]),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=8,
    ),
    "UNet2DModel": _direct(
        "UNet2DModel",
        lambda: {"sample": _random(1, 3, 8, 8), "timestep": _NOW},
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    ),
    "Kandinsky3UNet": _direct(
        "Kandinsky3UNet",
        lambda: _unet(encoder_attention_mask=torch.ones(1, TOKENS)),
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=TEXT_DIM,
    ),
    "AudioLDM2UNet2DConditionModel": _direct(
        "AudioLDM2UNet2DConditionModel",
        lambda: _unet(encoder_hidden_states_1=_random(1, 5, TEXT_DIM, seed=3)),
        **{**_SMALL_UNET, "cross_attention_dim": ((TEXT_DIM, TEXT_DIM), (TEXT_DIM, TEXT_DIM))},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "DreamLiteUNetModel": _direct(
        "DreamLiteUNetModel",
        _unet,
        **{**_SMALL_UNET, "block_out_channels": (32, 32, 64), "attention_head_dim": 8},
    ),
    "Kandinsky6SRTransformer3DModel": _direct(
        "Kandinsky6SRTransformer3DModel",
        lambda: {"hidden_states": _random(1, 2, 8, 8, 9), "timestep": _NOW},
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=2,
        axes_dims=ROPE,
    ),
    "StableAudio3DiTModel": _direct(
        "StableAudio3DiTModel",
        lambda: {
            "hidden_states": _random(1, 8, 16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": _text(),
            "global_hidden_states": _random(1, 12, seed=1),
        },
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=TEXT_DIM,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    ),
    "Transformer2DModel": _direct(
        "Transformer2DModel",
        lambda: {
            "hidden_states": torch.arange(16)[None] % 8,
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor(5),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        num_vector_embeds=8,
        num_embeds_ada_norm=8,
        cross_attention_dim=TEXT_DIM,
    ),
    "UNet1DModel": _direct(
        "UNet1DModel",
        lambda: {"sample": _random(1, 14, 16), "timestep": torch.tensor([5])},
        block_out_channels=(8, 8, 16, 16),
        in_channels=14,
        out_channels=14,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        out_block_type="OutConv1DBlock",
        flip_sin_to_cos=False,
        freq_shift=1.0,
        mid_block_type="MidResTemporalBlock1D",
        down_block_types=("DownResnetBlock1D",) * 4,
        up_block_types=("UpResnetBlock1D",) * 3,
        act_fn="swish",
    ),
    "UNetControlNetXSModel": _direct(
        "UNetControlNetXSModel",
        lambda: {**_unet(), "controlnet_cond": _random(1, 3, 2 * LATENT_SIZE, 2 * LATENT_SIZE, seed=4)},
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        cross_attention_dim=TEXT_DIM,
        transformer_layers_per_block=1,
        num_attention_heads=2,
        norm_num_groups=4,
        ctrl_block_out_channels=[2, 4],
        ctrl_num_attention_heads=4,
        ctrl_max_norm_num_groups=2,
        ctrl_conditioning_embedding_out_channels=(2, 2),
    ),
    "UVit2DModel": _direct(
        "UVit2DModel",
        lambda: {
            "input_ids": torch.arange(16).view(1, 4, 4),
            "encoder_hidden_states": _text(),
            "pooled_text_emb": _random(1, TEXT_DIM, seed=1),
            "micro_conds": torch.ones(1, 5),
        },
        hidden_size=32,
        cond_embed_dim=TEXT_DIM,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=5 * 8,
        encoder_hidden_size=TEXT_DIM,
        vocab_size=32,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        block_num_heads=2,
        intermediate_size=32,
        sample_size=4,
    ),
    "WanAnimate2Transformer3DModel": _direct(
        "WanAnimate2Transformer3DModel",
        _animate_2,
        text_len=16,
        in_dim=12,
        dim=32,
        ffn_dim=32,
        freq_dim=16,
        text_dim=TEXT_DIM,
        out_dim=4,
        num_heads=2,
        num_layers=2,
    ),
    "UniDiffuserModel": lambda: (
        seeded(
            lambda: UniDiffuserModel(
                text_dim=TEXT_DIM,
                clip_img_dim=8,
                num_text_tokens=TOKENS,
                num_attention_heads=2,
                attention_head_dim=4,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                sample_size=8,
                patch_size=2,
                norm_num_groups=1,
            )
        ),
        (),
        {
            "latent_image_embeds": _random(1, 4, 8, 8),
            "image_embeds": _random(1, 1, 8, seed=1),
            "prompt_embeds": _text(),
            "timestep_img": torch.tensor([500]),
            "timestep_text": torch.tensor([0]),
        },
    ),
}


def first_call(name: str) -> FirstCall:
    """Return a tiny denoiser of the class `name` with the arguments of a call of it.

    Raises:
        KeyError: there is no tiny configuration.
    """
    return FIRST_CALLS[name]()
