"""What is specific to a family of pipelines: one row of data each, no code elsewhere.

Rows are about diffusers' own classes, and a subclass has the row of its nearest base. `docs/reference/denoisers.md`
is made from them, and `tests/test_pipeline_walk.py` finds every class of the installed diffusers in one of them.
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
)
from tgate_compile.methods.method import Half

Row = TypeVar("Row")

#: The components that may be a pipeline's denoiser, in the order in which they are looked for.
DENOISER_NAMES = ("unet", "transformer")


@dataclass(frozen=True)
class Family:
    """Facts about one pipeline class.

    Attributes:
        interleaved: inputs whose rows alternate between the halves, [uncond, cond, uncond, cond, ...],
            instead of being [uncond...; cond...]; each a path of keywords in the denoiser's call.
        repeated: inputs with several rows for each of the latents' (one per frame), the halves one after the other;
            paths likewise.
        shared: inputs that both halves share, even where one has as many rows as the batch (a table of positions);
            paths likewise.
        order: the halves in the order in which they stand in a batch of both.
        calls: the guidance halves in the order in which they are evaluated, each in a denoiser call of its own;
            empty where one call has both.
        only: the half that can go on once guidance has stopped, where not both can.
        second: the component that is the denoiser of the timesteps below the boundary, where there are two.
        boundary: the pipeline's setting for that boundary, as a fraction of the training timesteps; None: no boundary.
        unguided: whether there are never two halves. `guidance_scale`, if the call has one, is then an input of the
            denoiser, which has been distilled to it.
    """

    interleaved: tuple[tuple[str, ...], ...] = ()
    repeated: tuple[tuple[str, ...], ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    order: tuple[Half, Half] = ("uncond", "cond")
    calls: tuple[Half, ...] = ()
    only: Half | None = None
    second: str | None = None
    boundary: str = ""
    unguided: bool = False


# One call with [uncond; cond], and nothing else to know.
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

# The image goes in with the cond half only: without it, the other half does not know what to animate.
_IMAGE_TO_VIDEO = Family(only="cond")

_PROMPT_FIRST = Family(order=("cond", "uncond"))
_UNGUIDED = Family(unguided=True)
_SHARED_POSITIONS = Family(shared=(("image_rotary_emb",),))

# The second call of a timestep is handed what the first has computed, so that the first's half goes on.
_TWO_CALLS = Family(calls=("cond", "uncond"), only="cond")
_TWO_CALLS_TWO_EXPERTS = replace(_TWO_CALLS, second="transformer_2", boundary="boundary_ratio")

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
)

#: diffusers' pipeline classes that can be gated, and what is to be known of each.
FAMILIES: Mapping[str, Family] = {name: family for family, names in _GROUPS for name in names}


def refusal(pipeline: type, denoiser: type | None = None, *, caches_cross: bool = True) -> str | None:
    """Why pipelines of class `pipeline` with a `denoiser` cannot be gated; None if nothing speaks against it.

    That there is no cross-attention speaks only against a schedule that caches it.
    """
    reason = _row_of(pipeline, {**REFUSED, **REFUSED_BASES})
    if reason in (_ADDED_KEYS, _TEXT_IN_CHANNELS) and not caches_cross:
        reason = None
    if reason is None and denoiser is not None:
        reason = _row_of(denoiser, REFUSED_DENOISERS)
    return reason


def is_listed(pipeline: type) -> bool:
    """Whether class `pipeline` has a row of facts, or one of its bases has."""
    return _row_of(pipeline, FAMILIES) is not None


def has_joint_attention(denoiser: type) -> bool:
    """Whether text and image tokens share one sequence in denoisers of this class."""
    return _row_of(denoiser, dict.fromkeys(JOINT_ATTENTION, True)) is not None


def family_of(pipeline: type) -> Family:
    """The facts about class `pipeline`: the row of the nearest of its bases that has one."""
    return _row_of(pipeline, FAMILIES) or Family()


def _row_of(cls: type, rows: Mapping[str, Row]) -> Row | None:
    """The row of `cls`, or of its nearest base that has one.

    Only diffusers' classes have rows: another's class that happens to have the same name is judged like an unknown one.
    """
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "diffusers" and base.__name__ in rows:
            return rows[base.__name__]
    return None
