"""Tiny pipelines of the real diffusers classes that make video; see `tiny_transformers.py`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    MotionAdapter,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from tests.tiny_pipelines import LATENT_SIZE, PROMPTS, SIZE, TEXT_DIM, VELOCITY, image, sdxl, seeded, stable_diffusion
from tests.tiny_transformers import embedded, embedded_prompts, silent

FRAMES = 3

_VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIZE,
    patch_size=8,
    projection_dim=TEXT_DIM,
)


def stable_video_diffusion() -> Any:
    """Return SVD, whose cross-attentions see one token, the image embedding, and return the same in all steps."""
    unet = seeded(
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",),
            cross_attention_dim=TEXT_DIM,
            num_attention_heads=4,
            num_frames=FRAMES,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=3 * 8,
        )
    )
    vae = seeded(
        lambda: AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        ),
        1,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=seeded(lambda: CLIPVisionModelWithProjection(_VISION), 2),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**VELOCITY),
        feature_extractor=CLIPImageProcessor(do_resize=False),
    )
    return silent(pipe)


def stable_video_diffusion_call(batch: int = 1) -> dict[str, Any]:
    return {"image": image(batch), "height": SIZE, "width": SIZE}


def animatediff() -> Any:
    """Return AnimateDiff, whose motion modules have two temporal self-attentions each, one called `attn2`."""
    source = stable_diffusion(layout="small")
    adapter = seeded(
        lambda: MotionAdapter(
            block_out_channels=(32,),
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=4,
            use_motion_mid_block=False,
        ),
        1,
    )
    pipe = AnimateDiffPipeline(
        vae=source.vae,
        text_encoder=source.text_encoder,
        tokenizer=source.tokenizer,
        unet=source.unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(**VELOCITY, clip_sample=False),
    )
    pipe.unet.requires_grad_(False)
    return silent(pipe)


def animatediff_call(batch: int = 1) -> dict[str, Any]:
    negative = ["dog", "snow"]
    return {"prompt": PROMPTS[:batch], "negative_prompt": negative[:batch], "num_frames": FRAMES}


def animatediff_xl() -> Any:
    source = sdxl()
    adapter = seeded(
        lambda: MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=4,
            use_motion_mid_block=False,
        ),
        1,
    )
    pipe = AnimateDiffSDXLPipeline(
        vae=source.vae,
        text_encoder=source.text_encoder,
        text_encoder_2=source.text_encoder_2,
        tokenizer=source.tokenizer,
        tokenizer_2=source.tokenizer_2,
        unet=source.unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(**VELOCITY, clip_sample=False),
    )
    # `UNetMotionModel.from_unet2d` does not copy this module, so it is unseeded.
    pipe.unet.add_embedding.load_state_dict(source.unet.add_embedding.state_dict())
    pipe.unet.requires_grad_(False)
    return silent(pipe)


def animatediff_xl_call(batch: int = 1) -> dict[str, Any]:
    return {**animatediff_call(batch), "negative_original_size": (256, 128), "negative_target_size": (8, 64)}


def latte() -> Any:
    """Return Latte, with alternating attention over space, with the text, and over time, without it."""
    transformer = seeded(
        lambda: LatteTransformer3DModel(
            sample_size=LATENT_SIZE,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=TEXT_DIM,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=FRAMES,
        )
    )
    scheduler = DDIMScheduler(**VELOCITY, clip_sample=False)
    pipe = LattePipeline(vae=None, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=scheduler)
    return silent(pipe)


def latte_call(batch: int = 1) -> dict[str, Any]:
    return {
        **embedded_prompts(batch),
        "negative_prompt": None,
        "clean_caption": False,
        "mask_feature": False,
        "video_length": FRAMES,
        "height": 8 * LATENT_SIZE,
        "width": 8 * LATENT_SIZE,
    }


def ltx() -> Any:
    transformer = seeded(
        lambda: LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=TEXT_DIM,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LTXPipeline(vae=None, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=scheduler)
    return silent(pipe)


def ltx_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch, masks=True), "height": 32 * 2, "width": 32 * 2, "num_frames": 9}


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_transformer(seed: int = 0, **changed: Any) -> WanTransformer3DModel:
    return seeded(lambda: WanTransformer3DModel(**{**WAN, **changed}), seed)


def wan(*, boundary_ratio: float | None = None, expand_timesteps: bool = False, **changed: Any) -> Any:
    """Return Wan 2.1, or, with a boundary, Wan 2.2, whose second transformer runs the timesteps below it.

    With `expand_timesteps` it is the small Wan 2.2, which takes a timestep for each token. `changed` overrides the
    transformer's configuration.
    """
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(**changed),
        transformer_2=None if boundary_ratio is None else wan_transformer(1, **changed),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )
    return silent(pipe)


def wan_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "height": 32, "width": 32, "num_frames": 5}


def wan_image_to_video() -> Any:
    """Return Wan 2.1, whose cross-attentions see the text and, with separate keys and values, the image."""
    vae = seeded(
        lambda: AutoencoderKLWan(
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
    in_channels = 4 + 4 + 4  # latents, the mask of given frames, and their latents
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(in_channels=in_channels, image_dim=TEXT_DIM, added_kv_proj_dim=24),
        image_encoder=seeded(lambda: CLIPVisionModel(_VISION), 2),
        image_processor=CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False),
    )
    return silent(pipe)


def wan_image_to_video_call(batch: int = 1) -> dict[str, Any]:
    return {
        "image": image(),
        # Tokens beyond 512 count as the image's.
        "prompt_embeds": embedded(batch, 512, TEXT_DIM, seed=1),
        "negative_prompt_embeds": embedded(batch, 512, TEXT_DIM, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def skyreels() -> Any:
    pipe = SkyReelsV2Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=seeded(lambda: SkyReelsV2Transformer3DModel(**WAN)),
    )
    return silent(pipe)


class PassingSafetyChecker(ModelMixin, ConfigMixin):
    """Replaces Cosmos' guardrail models of several gigabytes, as in diffusers' own tests."""

    device = torch.device("cpu")

    @register_to_config
    def __init__(self) -> None:
        super().__init__()

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos_transformer(in_channels: int = 4) -> CosmosTransformer3DModel:
    return seeded(
        lambda: CosmosTransformer3DModel(
            in_channels=in_channels,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=TEXT_DIM,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,  # it is resized with torchvision
            extra_pos_embed_type="learnable",
        )
    )


def cosmos() -> Any:
    pipe = CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=cosmos_transformer(),
        vae=None,
        scheduler=EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min", prediction_type="epsilon"
        ),
        safety_checker=PassingSafetyChecker(),
    )
    return silent(pipe)


def cosmos_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "height": 32, "width": 32, "num_frames": 9}


def cosmos_2() -> Any:
    """Return a pipeline that makes an image, as a video of one frame."""
    pipe = Cosmos2TextToImagePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=cosmos_transformer(),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=PassingSafetyChecker(),
    )
    return silent(pipe)


def cosmos_2_call(batch: int = 1) -> dict[str, Any]:
    return {**embedded_prompts(batch), "height": 32, "width": 32}
