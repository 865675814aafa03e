"""Properties that are specific to a family of pipelines, as one row of data each.

The rows describe diffusers' own classes; a subclass has the row of its nearest base. `docs/reference/denoisers.md` is
generated from them, and `tests/test_pipeline_walk.py` checks that every class of the installed diffusers is in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from tgate_compile.engine.unsupported import (
    _ADDED_KEYS,
    _TEXT_IN_CHANNELS,
    JOINT_ATTENTION,
    REFUSED,
    REFUSED_BASES,
    REFUSED_DENOISERS,
    UNCACHED_DENOISERS,
)
from tgate_compile.methods.method import Half

Row = TypeVar("Row")

#: The components that may be a pipeline's denoiser, in the order of preference.
DENOISER_NAMES = ("unet", "transformer")


@dataclass(frozen=True)
class Family:
    """The properties of one or several pipeline classes.

    `interleaved`, `repeated` and `shared` hold paths of keywords in the denoiser call.

    Attributes:
        interleaved: the inputs whose rows alternate between the halves, [uncond, cond, uncond, cond, ...],
            instead of being [uncond...; cond...].
        repeated: the inputs with several rows for each row of the latents (one per frame), one half after the other.
        shared: the inputs that both halves share, even if one has as many rows as the batch (a table of positions).
        order: the order of the halves in a batch that has both.
        calls: the guidance halves in the order in which they are evaluated, each in a separate denoiser call;
            empty if one call evaluates both.
        only: the only half that can be kept once guidance has stopped; None if either can.
        second: the component that denoises the timesteps below the boundary, if there are two denoisers.
        boundary: the name of the pipeline setting that holds the boundary, as a fraction of the training timesteps.
        scale: the argument of the call that scales guidance, for a class without `do_classifier_free_guidance`, or
            whose guidance also needs a negative prompt.
        negative: the arguments that stand for a negative prompt if they are all given, besides `negative_prompt`; if
            there are any, guidance is on only with a negative prompt.
        until: the argument of the call that holds the fraction of the steps after which guidance is off.
        guiders: the components that decide whether guidance is on, as in modular pipelines; the first that is there.
        listed: whether the batch is not a dimension: the denoiser takes and returns lists with one tensor for each row.
        batch_dims: the inputs that have the batch in another dimension than the first, with that dimension.
        last_tokens: whether the prediction is in the last of the tokens that the denoiser returns, not in the first.
        prepares: whether calls of the denoiser before the scheduler's timesteps are set are not part of the loop.
        further: whether there may be further calls of a timestep after that of both halves, for predictions that
            guidance moves away from (layers skipped, modalities isolated): their difference to the prompt's is added.
        unguided: whether there are never two halves. `guidance_scale`, if the call has one, is then an input of the
            denoiser, which has been distilled with it.
    """

    interleaved: tuple[tuple[str, ...], ...] = ()
    repeated: tuple[tuple[str, ...], ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    order: tuple[Half, Half] = ("uncond", "cond")
    calls: tuple[Half, ...] = ()
    only: Half | None = None
    second: str | None = None
    boundary: str = ""
    scale: str = "guidance_scale"
    negative: tuple[str, ...] = ()
    until: str = ""
    guiders: tuple[str, ...] = ()
    listed: bool = False
    batch_dims: tuple[tuple[tuple[str, ...], int], ...] = ()
    last_tokens: bool = False
    prepares: bool = False
    further: bool = False
    unguided: bool = False


# One call with [uncond; cond], and no special properties.
_ONE_CALL = Family()

# `StableDiffusionXLPipeline.__call__` concatenates the negative and positive time ids *before* it repeats them
# for the batch, and so do some of its siblings; the others repeat first.
_SIZES_ALTERNATE = Family(interleaved=(("added_cond_kwargs", "time_ids"),))

# The prompt comes once per frame; so do the residuals of a ControlNet.
_TEXT_PER_FRAME = Family(repeated=(("encoder_hidden_states",),))
_TEXT_AND_RESIDUALS_PER_FRAME = Family(
    repeated=(
        ("encoder_hidden_states",),
        ("down_block_additional_residuals",),
        ("mid_block_additional_residual",),
    )
)

# Only the cond half gets the image: the other half alone has nothing to animate.
_IMAGE_TO_VIDEO = Family(only="cond")

_PROMPT_FIRST = Family(order=("cond", "uncond"))
_UNGUIDED = Family(unguided=True)
_SHARED_POSITIONS = Family(shared=(("image_rotary_emb",),))

# After the gate, the second call of a timestep returns the result of the first, so the half of the first is kept.
_TWO_CALLS = Family(calls=("cond", "uncond"), only="cond")
_TWO_CALLS_TWO_EXPERTS = replace(_TWO_CALLS, second="transformer_2", boundary="boundary_ratio")

# `guidance_scale` is then an input of the denoiser; a negative prompt and this scale add guidance.
_TRUE_GUIDANCE = replace(_TWO_CALLS, scale="true_cfg_scale", negative=("negative_prompt_embeds",))

_GROUPS: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (
        _ONE_CALL,
        (
            "AltDiffusionImg2ImgPipeline",
            "AltDiffusionPipeline",
            "AnyFlowPipeline",
            "AudioLDM2Pipeline",
            "BlipDiffusionControlNetPipeline",
            "BlipDiffusionPipeline",
            "I2VGenXLPipeline",
            "Kandinsky3Img2ImgPipeline",
            "Kandinsky3Pipeline",
            "LDMTextToImagePipeline",
            "LTXConditionPipeline",
            "LTXImageToVideoPipeline",
            "LTXPipeline",
            "LattePipeline",
            "PaintByExamplePipeline",
            "PixArtAlphaPipeline",
            "SemanticStableDiffusionPipeline",
            "PixArtSigmaPipeline",
            "SanaControlNetPipeline",
            "SanaImageToVideoPipeline",
            "SanaPipeline",
            "SanaVideoPipeline",
            "StableAudio3Pipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetXSPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionImageVariationPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionLDM3DPipeline",
            "StableDiffusionLatentUpscalePipeline",
            "StableDiffusionModelEditingPipeline",
            "StableDiffusionPipeline",
            "StableDiffusionUpscalePipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableUnCLIPPipeline",
            "TextToVideoSDPipeline",
            "VideoToVideoSDPipeline",
        ),
    ),
    (
        _SIZES_ALTERNATE,
        (
            "KolorsImg2ImgPipeline",
            "KolorsPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetXSPipeline",
            "StableDiffusionXLPipeline",
        ),
    ),
    (_TEXT_PER_FRAME, ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "PIAPipeline")),
    (
        _TEXT_AND_RESIDUALS_PER_FRAME,
        (
            "AnimateDiffControlNetPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
        ),
    ),
    (replace(_SIZES_ALTERNATE, repeated=_TEXT_PER_FRAME.repeated), ("AnimateDiffSDXLPipeline",)),
    (_SHARED_POSITIONS, ("AllegroPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPipeline")),
    (Family(shared=(("rotary_embedding",),)), ("StableAudioPipeline",)),
    # "LuminaText2ImgPipeline" is the name that `LuminaPipeline` had in older versions of diffusers.
    (_PROMPT_FIRST, ("LuminaPipeline", "LuminaText2ImgPipeline")),
    (_IMAGE_TO_VIDEO, ("StableVideoDiffusionPipeline",)),
    (
        _TWO_CALLS,
        (
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Kandinsky5I2IPipeline",
            "Kandinsky5I2VPipeline",
            "Kandinsky5T2IPipeline",
            "Kandinsky5T2VPipeline",
            "LongCatAudioDiTPipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2Pipeline",
            "WanVideoToVideoPipeline",
        ),
    ),
    (
        _TWO_CALLS_TWO_EXPERTS,
        ("LucyEditPipeline", "WanImageToVideoPipeline", "WanPipeline", "WanVACEPipeline"),
    ),
    (
        _UNGUIDED,
        (
            "DreamLiteMobilePipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "LatentConsistencyModelPipeline",
            "MarigoldDepthPipeline",
            "MarigoldIntrinsicsPipeline",
            "MarigoldNormalsPipeline",
            "SanaSprintImg2ImgPipeline",
            "SanaSprintPipeline",
            "StableAudio3AudioToAudioPipeline",
            "StableAudio3InpaintPipeline",
        ),
    ),
    # Joint attention.
    (
        _ONE_CALL,
        (
            "AuraFlowPipeline",
            "CogView3PlusPipeline",
            "ErnieImagePipeline",
            "MochiPipeline",
            "PRXPipeline",
            "PRXPixelPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
        ),
    ),
    (
        Family(further=True),
        (
            "LTX2ConditionPipeline",
            "LTX2HDRPipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2InContextPipeline",
            "LTX2Pipeline",
            "StableDiffusion3Pipeline",
        ),
    ),
    (
        _SHARED_POSITIONS,
        (
            "CogVideoXFunControlPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXPipeline",
            "CogVideoXVideoToVideoPipeline",
            "ConsisIDPipeline",
            "EasyAnimateControlPipeline",
            "EasyAnimateInpaintPipeline",
            "EasyAnimatePipeline",
        ),
    ),
    (Family(shared=(("txt_ids",), ("img_ids",))), ("BriaFiboEditPipeline", "BriaFiboPipeline", "BriaPipeline")),
    (Family(listed=True), ("JoyImageEditPlusPipeline",)),
    (Family(order=("cond", "uncond"), only="cond"), ("OmniGenPipeline",)),
    (Family(batch_dims=((("encoder_hidden_states_llama3",), 1),)), ("HiDreamImagePipeline",)),
    (
        Family(order=("cond", "uncond"), listed=True),
        (
            "ZImageControlNetInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageOmniPipeline",
            "ZImagePipeline",
        ),
    ),
    (
        _TWO_CALLS,
        (
            "BriaFibo2Pipeline",
            "ChromaImg2ImgPipeline",
            "ChromaInpaintPipeline",
            "ChromaPipeline",
            "CogView4ControlPipeline",
            "CogView4Pipeline",
            "Cosmos3OmniPipeline",
            "Flux2KleinInpaintPipeline",
            "Flux2KleinPipeline",
            "JoyImageEditPipeline",
            "Kandinsky6TI2VAPipeline",
            "Krea2Pipeline",
            "LongCatImageEditPipeline",
            "LongCatImagePipeline",
            "NucleusMoEImagePipeline",
            "OvisImagePipeline",
        ),
    ),
    (replace(_TWO_CALLS, prepares=True), ("GlmImagePipeline",)),
    (replace(_TWO_CALLS, until="cfg_trunc_ratio"), ("Lumina2Pipeline",)),
    (
        replace(_TRUE_GUIDANCE, negative=("negative_prompt_embeds", "negative_pooled_prompt_embeds")),
        (
            "FluxControlNetPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxKontextInpaintPipeline",
            "FluxKontextPipeline",
            "FluxPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
            "HunyuanVideoPipeline",
        ),
    ),
    (
        replace(_TRUE_GUIDANCE, negative=("negative_prompt_embeds", "negative_pooled_prompt_embeds"), last_tokens=True),
        ("HunyuanVideoImageToVideoPipeline",),
    ),
    (
        _TRUE_GUIDANCE,
        (
            "QwenImageControlNetInpaintPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageLayeredPipeline",
            "QwenImagePipeline",
        ),
    ),
    (replace(_TRUE_GUIDANCE, last_tokens=True), ("QwenImage21Pipeline",)),
    (
        replace(_TWO_CALLS, guiders=("guider",)),
        (
            "HunyuanImageRefinerPipeline",
            "HunyuanVideo15ImageToVideoPipeline",
            "HunyuanVideo15Pipeline",
            "MotifVideoImage2VideoPipeline",
            "MotifVideoPipeline",
        ),
    ),
    (replace(_TWO_CALLS, guiders=("ocr_guider", "guider")), ("HunyuanImagePipeline",)),
    (
        _UNGUIDED,
        (
            "Flux2KleinKVPipeline",
            "Flux2Pipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "FluxControlPipeline",
            "FluxFillPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
            "VisualClozeGenerationPipeline",
            "VisualClozePipeline",
        ),
    ),
)

#: The pipeline classes of diffusers whose guidance can be dropped, with their properties. Those whose denoiser has
#: cross-attentions can be gated as well.
FAMILIES: Mapping[str, Family] = {name: family for family, names in _GROUPS for name in names}


def refusal(pipeline: type, denoiser: type | None = None, *, caches_cross: bool = True) -> str | None:
    """Return why pipelines of class `pipeline` with a `denoiser` cannot be gated; None if they can.

    A lack of cross-attention matters only if the schedule caches it (`caches_cross`).
    """
    reason = _row_of(pipeline, {**REFUSED, **REFUSED_BASES})
    if reason in (_ADDED_KEYS, _TEXT_IN_CHANNELS) and not caches_cross:
        reason = None
    if reason is None and denoiser is not None:
        reason = _row_of(denoiser, REFUSED_DENOISERS)
        if reason is None and caches_cross:
            reason = _row_of(denoiser, UNCACHED_DENOISERS)
    return reason


def is_listed(pipeline: type) -> bool:
    """Return whether the class `pipeline` or one of its bases has a row."""
    return _row_of(pipeline, FAMILIES) is not None


def has_joint_attention(denoiser: type) -> bool:
    """Return whether text and image tokens share one sequence in denoisers of this class."""
    return _row_of(denoiser, dict.fromkeys(JOINT_ATTENTION, True)) is not None


def family_of(pipeline: type) -> Family:
    """Return the properties of the class `pipeline`: the row of its nearest base that has one."""
    return _row_of(pipeline, FAMILIES) or Family()


def _row_of(cls: type, rows: Mapping[str, Row]) -> Row | None:
    """Return the row of `cls`, or of its nearest base that has one.

    Only diffusers' classes have rows: a class of another package with the same name is treated as unknown.
    """
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "diffusers" and base.__name__ in rows:
            return rows[base.__name__]
    return None
