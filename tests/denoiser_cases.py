"""The pipelines besides Stable Diffusion and PixArt: how to call each, and the expected facts about its denoiser.

Written by hand from diffusers' code, and checked in `test_denoisers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from tests import tiny_gated, tiny_siblings, tiny_transformers, tiny_video
from tests.denoiser_reference import OneCall, TwoCalls, played
from tests.tiny_pipelines import image, latent_consistency


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        build: makes the pipeline, always with the same weights.
        call: returns the arguments of its call for a number of prompts.
        sites: the paths of the cross-attentions of its denoiser, or of each of its denoisers.
        halved: see `OneCall`; empty if each guidance half has a separate denoiser call.
        alternating: see `OneCall`.
        kept: see `OneCall`; the position of the negative prompt's half, unless a comment says otherwise.
        guidance: the call's guidance argument, which is 1 for no guidance.
        denoisers: the names of the denoisers.
        gate: the gate of the tests, for `STEPS` steps.
        strip: the schedule strip for these steps.
        guided: whether there is guidance; without it, each call is a step.
        exact: whether caching alone changes nothing, since the cached values are the same in all steps.
    """

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    sites: tuple[str, ...]
    halved: tuple[str, ...] = ()
    alternating: tuple[str, ...] = ()
    kept: int = 0
    guidance: str = "guidance_scale"
    denoisers: tuple[str, ...] = ("transformer",)
    gate: int = 3
    strip: str = "FFFppp"
    guided: bool = True
    exact: bool = False


STEPS = 6

_UNET = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
)
_BLOCKS = ("blocks.0.attn2", "blocks.1.attn2")
_TRANSFORMER_BLOCKS = ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2")
_LATENTS_TIME_TEXT = ("hidden_states", "timestep", "encoder_hidden_states")

CASES = {
    "AnimateDiffPipeline": Case(
        tiny_video.animatediff,
        tiny_video.animatediff_call,
        _UNET,  # without the motion modules' `attn2`, which attend to the latents only
        halved=("sample", "encoder_hidden_states"),
        denoisers=("unet",),
    ),
    "AnimateDiffSDXLPipeline": Case(
        tiny_video.animatediff_xl,
        tiny_video.animatediff_xl_call,
        tuple(
            f"{place}.transformer_blocks.{block}.attn2"
            for place in ("down_blocks.1.attentions.0", "mid_block.attentions.0")
            for block in (0, 1)
        ),
        halved=("sample", "encoder_hidden_states", "added_cond_kwargs"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "KolorsPipeline": Case(
        tiny_transformers.kolors,
        tiny_transformers.kolors_call,
        _UNET,
        halved=("sample", "encoder_hidden_states", "added_cond_kwargs"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "HunyuanDiTPipeline": Case(
        tiny_transformers.hunyuan_dit,
        tiny_transformers.hunyuan_dit_call,
        _BLOCKS,
        halved=(
            *_LATENTS_TIME_TEXT,
            "text_embedding_mask",
            "encoder_hidden_states_t5",
            "text_embedding_mask_t5",
            # The rows of both alternate, but are all equal.
            "image_meta_size",
            "style",
        ),
    ),
    "LattePipeline": Case(
        tiny_video.latte,
        tiny_video.latte_call,
        _TRANSFORMER_BLOCKS,  # there is none in `temporal_transformer_blocks`
        halved=_LATENTS_TIME_TEXT,
    ),
    "SanaPipeline": Case(
        tiny_transformers.sana,
        tiny_transformers.sana_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask"),
    ),
    "LTXPipeline": Case(
        tiny_video.ltx,
        tiny_video.ltx_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask"),
    ),
    "StableAudioPipeline": Case(
        tiny_transformers.stable_audio,
        tiny_transformers.stable_audio_call,
        _TRANSFORMER_BLOCKS,
        halved=("hidden_states", "encoder_hidden_states", "global_hidden_states"),
    ),
    "LuminaPipeline": Case(
        tiny_transformers.lumina,
        tiny_transformers.lumina_call,
        ("layers.0.attn2", "layers.1.attn2"),
        halved=(*_LATENTS_TIME_TEXT, "encoder_mask"),
        kept=1,  # the prompt's half comes first here
    ),
    "StableVideoDiffusionPipeline": Case(
        tiny_video.stable_video_diffusion,
        tiny_video.stable_video_diffusion_call,
        tuple(
            f"{place}.{blocks}.0.attn2"
            for place in ("down_blocks.0.attentions.0", "mid_block.attentions.0")
            for blocks in ("transformer_blocks", "temporal_transformer_blocks")
        ),
        halved=("sample", "encoder_hidden_states", "added_time_ids"),
        kept=1,  # the half with the image
        guidance="max_guidance_scale",
        denoisers=("unet",),
        exact=True,
    ),
    "WanPipeline": Case(tiny_video.wan, tiny_video.wan_call, _BLOCKS),
    "WanPipeline, two transformers": Case(
        lambda: tiny_video.wan(boundary_ratio=0.5),
        tiny_video.wan_call,
        _BLOCKS,
        denoisers=("transformer", "transformer_2"),
        gate=1,
        strip="Fppp|Fp",
    ),
    "WanImageToVideoPipeline": Case(tiny_video.wan_image_to_video, tiny_video.wan_image_to_video_call, _BLOCKS),
    "SkyReelsV2Pipeline": Case(tiny_video.skyreels, tiny_video.wan_call, _BLOCKS),
    "CosmosTextToWorldPipeline": Case(tiny_video.cosmos, tiny_video.cosmos_call, _TRANSFORMER_BLOCKS),
    "Cosmos2TextToImagePipeline": Case(tiny_video.cosmos_2, tiny_video.cosmos_2_call, _TRANSFORMER_BLOCKS),
}

_UNET_XL = tuple(
    f"{place}.transformer_blocks.{block}.attn2"
    for place in ("down_blocks.1.attentions.0", "mid_block.attentions.0")
    for block in (0, 1)
)
_SAMPLE_TEXT = ("sample", "encoder_hidden_states")
_VISUAL_BLOCKS = ("visual_transformer_blocks.0.cross_attention", "visual_transformer_blocks.1.cross_attention")
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")

#: Pipelines that share a denoiser with one tested in depth, but pass it other inputs or lay them out differently.
SIBLINGS = {
    "StableDiffusionControlNetImg2ImgPipeline": Case(
        lambda: tiny_siblings.controlnet("StableDiffusionControlNetImg2ImgPipeline"),
        tiny_siblings.controlnet_img2img_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS),
        denoisers=("unet",),
    ),
    "StableDiffusionControlNetInpaintPipeline": Case(
        lambda: tiny_siblings.controlnet("StableDiffusionControlNetInpaintPipeline"),
        tiny_siblings.controlnet_inpaint_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS),
        denoisers=("unet",),
    ),
    "StableDiffusionXLControlNetPipeline": Case(
        lambda: tiny_siblings.controlnet_xl("StableDiffusionXLControlNetPipeline"),
        tiny_siblings.controlnet_xl_call,
        _UNET_XL,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS, "added_cond_kwargs"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(
        lambda: tiny_siblings.controlnet_xl("StableDiffusionXLControlNetImg2ImgPipeline"),
        lambda batch: {**tiny_siblings.controlnet_img2img_call(batch), **tiny_siblings.SIZES},
        _UNET_XL,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS, "added_cond_kwargs"),
        denoisers=("unet",),
    ),
    "StableDiffusionXLControlNetUnionPipeline": Case(
        tiny_siblings.controlnet_union_xl,
        tiny_siblings.controlnet_union_xl_call,
        _UNET_XL,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS, "added_cond_kwargs"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "StableDiffusionUpscalePipeline": Case(
        tiny_siblings.upscale,
        tiny_siblings.upscale_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, "class_labels"),
        denoisers=("unet",),
    ),
    "AnimateDiffControlNetPipeline": Case(
        tiny_siblings.animatediff_controlnet,
        tiny_siblings.animatediff_controlnet_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS),
        denoisers=("unet",),
    ),
    "TextToVideoSDPipeline": Case(
        tiny_siblings.text_to_video,
        tiny_siblings.text_to_video_call,
        _UNET,
        halved=_SAMPLE_TEXT,
        denoisers=("unet",),
    ),
    "LTXImageToVideoPipeline": Case(
        tiny_siblings.ltx_image_to_video,
        tiny_siblings.ltx_image_to_video_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask"),
    ),
    "SanaVideoPipeline": Case(
        tiny_siblings.sana_video,
        tiny_siblings.sana_video_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask"),
    ),
    "HunyuanDiTControlNetPipeline": Case(
        tiny_siblings.hunyuan_dit_controlnet,
        tiny_siblings.hunyuan_dit_controlnet_call,
        _BLOCKS,
        halved=(*CASES["HunyuanDiTPipeline"].halved, "controlnet_block_samples"),
    ),
    "AllegroPipeline": Case(
        tiny_siblings.allegro,
        tiny_siblings.allegro_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask"),
    ),
    "AnyFlowPipeline": Case(
        tiny_siblings.anyflow, tiny_siblings.anyflow_call, _BLOCKS, halved=(*_LATENTS_TIME_TEXT, "r_timestep")
    ),
    "WanVideoToVideoPipeline": Case(tiny_siblings.wan_video_to_video, tiny_siblings.wan_video_to_video_call, _BLOCKS),
    "WanVACEPipeline": Case(
        tiny_siblings.wan_vace,
        tiny_video.wan_call,
        (*_BLOCKS, "vace_blocks.0.attn2"),
    ),
    "Cosmos2VideoToWorldPipeline": Case(
        tiny_siblings.cosmos_2_video, tiny_siblings.cosmos_2_video_call, _TRANSFORMER_BLOCKS
    ),
    "Kandinsky5T2VPipeline": Case(
        tiny_siblings.kandinsky_5,
        tiny_siblings.kandinsky_5_call,
        _VISUAL_BLOCKS,
    ),
}


def _of_both(*places: str, blocks: Sequence[int] = (0,)) -> tuple[str, ...]:
    """Return the sites of a UNet with ControlNet-XS: those at `places`, and the same of its control part."""
    paths = [f"{place}.transformer_blocks.{block}.attn2" for place in places for block in blocks]
    return tuple(path.replace("base_", part) for path in paths for part in ("base_", "ctrl_"))


_UNET_LCM = (*_UNET, *(f"up_blocks.1.attentions.{number}.transformer_blocks.0.attn2" for number in (0, 1)))
_CROSS_ATTN = ("transformer_blocks.0.cross_attn", "transformer_blocks.1.cross_attn")

#: Pipelines whose denoiser no other test runs, and further siblings.
SIBLINGS |= {
    "I2VGenXLPipeline": Case(
        tiny_gated.i2vgen_xl,
        tiny_gated.i2vgen_xl_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, "fps", "image_latents", "image_embeddings"),
        denoisers=("unet",),
    ),
    "VideoToVideoSDPipeline": Case(
        tiny_gated.video_to_video, tiny_gated.video_to_video_call, _UNET, halved=_SAMPLE_TEXT, denoisers=("unet",)
    ),
    "AnimateDiffVideoToVideoPipeline": Case(
        tiny_gated.animatediff_video, tiny_gated.animatediff_video_call, _UNET, halved=_SAMPLE_TEXT, denoisers=("unet",)
    ),
    "LTXConditionPipeline": Case(
        tiny_gated.ltx_condition,
        tiny_gated.ltx_condition_call,
        _TRANSFORMER_BLOCKS,
        halved=(*_LATENTS_TIME_TEXT, "encoder_attention_mask", "video_coords"),
    ),
    "StableDiffusionControlNetXSPipeline": Case(
        lambda: tiny_gated.controlnet_xs("StableDiffusionControlNetXSPipeline"),
        tiny_gated.controlnet_xs_call,
        _of_both(
            "down_blocks.0.base_attentions.0", "down_blocks.0.base_attentions.1", "mid_block.base_midblock.attentions.0"
        ),
        halved=(*_SAMPLE_TEXT, "controlnet_cond"),
        denoisers=("unet",),
    ),
    "StableDiffusionXLControlNetXSPipeline": Case(
        lambda: tiny_gated.controlnet_xs("StableDiffusionXLControlNetXSPipeline"),
        lambda batch: {**tiny_gated.controlnet_xs_call(batch), **tiny_siblings.SIZES},
        _of_both(
            "down_blocks.1.base_attentions.0",
            "down_blocks.1.base_attentions.1",
            "mid_block.base_midblock.attentions.0",
            blocks=(0, 1),
        ),
        halved=(*_SAMPLE_TEXT, "controlnet_cond", "added_cond_kwargs"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "StableAudio3Pipeline": Case(
        tiny_gated.stable_audio_3,
        tiny_gated.stable_audio_3_call,
        _CROSS_ATTN,
        halved=(*_LATENTS_TIME_TEXT, "global_hidden_states", "encoder_attention_mask"),
    ),
    "LongCatAudioDiTPipeline": Case(
        tiny_gated.longcat_audio, tiny_gated.longcat_audio_call, ("blocks.0.cross_attn", "blocks.1.cross_attn")
    ),
    "SanaSprintPipeline": Case(
        tiny_gated.sana_sprint,
        tiny_gated.sana_sprint_call,
        _TRANSFORMER_BLOCKS,
        strip="fffppp",
        guided=False,
    ),
    "StableAudio3AudioToAudioPipeline": Case(
        lambda: tiny_gated.stable_audio_3_edit("StableAudio3AudioToAudioPipeline"),
        tiny_gated.stable_audio_3_edit_call,
        _CROSS_ATTN,
        strip="fffppp",
        guided=False,
    ),
    "StableAudio3InpaintPipeline": Case(
        lambda: tiny_gated.stable_audio_3_edit("StableAudio3InpaintPipeline"),
        lambda batch: {
            **tiny_gated.stable_audio_3_edit_call(batch),
            "mask_start_seconds": 0.1,
            "mask_end_seconds": 0.3,
        },
        _CROSS_ATTN,
        strip="fffppp",
        guided=False,
    ),
    "SkyReelsV2ImageToVideoPipeline": Case(
        tiny_gated.skyreels_image_to_video, tiny_video.wan_image_to_video_call, _BLOCKS
    ),
    "CosmosVideoToWorldPipeline": Case(tiny_gated.cosmos_video, tiny_gated.cosmos_video_call, _TRANSFORMER_BLOCKS),
    "LatentConsistencyModelImg2ImgPipeline": Case(
        lambda: latent_consistency("LatentConsistencyModelImg2ImgPipeline"),
        lambda batch: {"prompt": tiny_siblings.PROMPTS[:batch], "image": image(batch), "strength": 1.0},
        _UNET_LCM,
        denoisers=("unet",),
        strip="fffppp",
        guided=False,
    ),
    "LucyEditPipeline": Case(tiny_gated.lucy_edit, tiny_gated.lucy_edit_call, _BLOCKS),
    "Kandinsky5T2IPipeline": Case(
        lambda: tiny_gated.kandinsky_5("Kandinsky5T2IPipeline"),
        tiny_gated.kandinsky_5_call,
        _VISUAL_BLOCKS,
    ),
    "Kandinsky5I2IPipeline": Case(
        lambda: tiny_gated.kandinsky_5("Kandinsky5I2IPipeline"),
        lambda batch: {**tiny_gated.kandinsky_5_call(batch), "image": tiny_gated.picture(64)},
        _VISUAL_BLOCKS,
    ),
    "StableDiffusionXLAdapterPipeline": Case(
        tiny_gated.xl_adapter,
        tiny_gated.xl_adapter_call,
        _UNET_XL,
        halved=(*_SAMPLE_TEXT, "added_cond_kwargs", "down_intrablock_additional_residuals"),
        alternating=("time_ids",),
        denoisers=("unet",),
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Case(
        lambda: tiny_siblings.controlnet_xl("StableDiffusionXLControlNetInpaintPipeline"),
        lambda batch: {**tiny_siblings.controlnet_inpaint_call(batch), **tiny_siblings.SIZES},
        _UNET_XL,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS, "added_cond_kwargs"),
        denoisers=("unet",),
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(
        tiny_gated.animatediff_video_controlnet,
        tiny_gated.animatediff_video_controlnet_call,
        _UNET,
        halved=(*_SAMPLE_TEXT, *_RESIDUALS),
        denoisers=("unet",),
    ),
    "DreamLiteMobilePipeline": Case(
        tiny_gated.dreamlite,
        tiny_gated.dreamlite_call,
        tuple(
            f"{place}.transformer_blocks.0.attn2"
            for place in (
                "down_blocks.0.attentions.0",
                "down_blocks.1.attentions.0",
                "mid_block.attentions.0",
                "up_blocks.0.attentions.0",
                "up_blocks.0.attentions.1",
            )
        ),
        denoisers=("unet",),
        strip="fffppp",
        guided=False,
    ),
}

#: One sibling for each input that the pipelines tested in depth lack; the others are in the sweep.
DISTINCT = (
    "StableDiffusionControlNetInpaintPipeline",  # a mask and an image beside the latents, and residuals
    "StableDiffusionXLControlNetUnionPipeline",  # sizes in other orders, and residuals
    "StableDiffusionUpscalePipeline",  # class labels
    "AnimateDiffControlNetPipeline",  # residuals for frames
    "HunyuanDiTControlNetPipeline",  # a transformer's residuals
    "LTXImageToVideoPipeline",  # a timestep for each token
    "AnyFlowPipeline",  # a second timestep
    "WanVACEPipeline",  # a second stack of blocks
    "Cosmos2VideoToWorldPipeline",  # two calls, and given frames
    "Kandinsky5T2VPipeline",  # attentions with other names
    "StableAudio3Pipeline",  # the duration as a token of the text
    "LongCatAudioDiTPipeline",  # two calls, whose texts have other lengths
    "SanaSprintPipeline",  # the guidance scale as an input
    "DreamLiteMobilePipeline",  # a UNet without halves
)
#: Pipelines that diffusers itself cannot call with two prompts.
ONE_PROMPT = (
    "AnimateDiffControlNetPipeline", "WanVACEPipeline", "I2VGenXLPipeline", "VideoToVideoSDPipeline",
    "AnimateDiffVideoToVideoPipeline", "DreamLiteMobilePipeline", "LucyEditPipeline", "Kandinsky5I2IPipeline",
    "StableDiffusionXLAdapterPipeline", "AnimateDiffVideoToVideoControlNetPipeline",
)  # fmt: skip


def run(pipe: Any, **call: Any) -> torch.Tensor:
    """Call `pipe` with a seeded generator, and return latents."""
    call = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    with torch.random.fork_rng():
        torch.manual_seed(1)  # I2VGen-XL encodes its image with noise of its own
        return pipe(generator=torch.Generator().manual_seed(0), **call)[0]


def expected_of(
    case: Case,
    pipe: Any,
    call: dict[str, Any],
    *,
    gates: Sequence[int] | None = None,
    guided: bool = True,
    kept: int | None = None,
    cached: bool = True,
) -> torch.Tensor:
    """Run `pipe(**call)` with T-GATE by plain hooks or, if `cached` is False, only without guidance after the gate."""
    with ExitStack() as stack:
        for name, gate in zip(case.denoisers, gates or [case.gate] * len(case.denoisers), strict=True):
            denoiser = getattr(pipe, name)
            reference: OneCall | TwoCalls
            if case.halved:
                reference = OneCall(
                    denoiser,
                    gate,
                    guided=guided,
                    halved=case.halved,
                    alternating=case.alternating,
                    kept=case.kept if kept is None else kept,
                )
            else:
                reference = TwoCalls(
                    denoiser, gate, guided=lambda: guided and getattr(pipe, "do_classifier_free_guidance", True)
                )
            stack.enter_context(played(reference, denoiser, case.sites if cached else ()))
        return run(pipe, **call)


def _is_guided(pipe: Any) -> bool:
    """Whether `pipe` now makes the second of two calls. Pipelines without a property for this always use guidance."""
    return bool(getattr(pipe, "do_classifier_free_guidance", True))
