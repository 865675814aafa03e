"""What is specific to a family of pipelines: one row of data each, no code elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tgate_compile._schedule import Half

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
    """

    interleaved: tuple[tuple[str, ...], ...] = ()
    repeated: tuple[tuple[str, ...], ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    order: tuple[Half, Half] = ("uncond", "cond")
    calls: tuple[Half, ...] = ()
    only: Half | None = None
    second: str | None = None
    boundary: str = ""


# `StableDiffusionXLPipeline.__call__` concatenates the negative and positive time ids *before* it repeats them
# for the batch, and so does its ControlNet sibling; the other SDXL pipelines repeat first.
_SDXL = Family(interleaved=(("added_cond_kwargs", "time_ids"),))

# The prompt comes once per frame.
_TEXT_PER_FRAME = Family(repeated=(("encoder_hidden_states",),))

# The image goes in with the cond half only: without it, the other half does not know what to animate.
_IMAGE_TO_VIDEO = Family(only="cond")

_PROMPT_FIRST = Family(order=("cond", "uncond"))

# The second call of a timestep is handed what the first has computed, so that the first's half goes on.
_TWO_CALLS = Family(calls=("cond", "uncond"), only="cond")
_TWO_CALLS_TWO_EXPERTS = Family(
    calls=("cond", "uncond"), only="cond", second="transformer_2", boundary="boundary_ratio"
)

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLControlNetPipeline": _SDXL,
    "StableDiffusionXLAdapterPipeline": _SDXL,
    "KolorsPipeline": _SDXL,
    "KolorsImg2ImgPipeline": _SDXL,
    "AnimateDiffPipeline": _TEXT_PER_FRAME,
    "AnimateDiffControlNetPipeline": _TEXT_PER_FRAME,
    "AnimateDiffSDXLPipeline": Family(interleaved=_SDXL.interleaved, repeated=_TEXT_PER_FRAME.repeated),
    "AnimateDiffSparseControlNetPipeline": _TEXT_PER_FRAME,
    "AnimateDiffVideoToVideoPipeline": _TEXT_PER_FRAME,
    "AnimateDiffVideoToVideoControlNetPipeline": _TEXT_PER_FRAME,
    "HunyuanDiTPipeline": Family(shared=(("image_rotary_emb",),)),
    "StableAudioPipeline": Family(shared=(("rotary_embedding",),)),
    "LuminaPipeline": _PROMPT_FIRST,
    "LuminaText2ImgPipeline": _PROMPT_FIRST,
    "StableVideoDiffusionPipeline": _IMAGE_TO_VIDEO,
    "WanPipeline": _TWO_CALLS_TWO_EXPERTS,
    "WanImageToVideoPipeline": _TWO_CALLS_TWO_EXPERTS,
    "WanVideoToVideoPipeline": _TWO_CALLS,
    "WanVACEPipeline": _TWO_CALLS_TWO_EXPERTS,
    "SkyReelsV2Pipeline": _TWO_CALLS,
    "SkyReelsV2ImageToVideoPipeline": _TWO_CALLS,
    "CosmosTextToWorldPipeline": _TWO_CALLS,
    "CosmosVideoToWorldPipeline": _TWO_CALLS,
    "Cosmos2TextToImagePipeline": _TWO_CALLS,
    "Cosmos2VideoToWorldPipeline": _TWO_CALLS,
}

_THREE_WAY = (
    "its guidance has three halves, [text; image; uncond], and the gate merges two. "
    "What works instead: the pipeline without tgate_compile, or with fewer steps"
)
_PERTURBED = (
    "perturbed guidance needs a second, differently computed prediction in every step, which the pruned graph does "
    "not make. What works instead: the same checkpoint in its ordinary pipeline (`from_pipe`)"
)
_SEVERAL_CALLS = (
    "it calls its denoiser several times per step for different inputs, so that one cache cannot stand for them. "
    "What works instead: the pipeline without tgate_compile"
)
_ATTENTION_MAPS = (
    "it reads or changes the attention maps while it runs, and a compiled graph has none to read. "
    "What works instead: the pipeline without tgate_compile"
)

#: Pipeline classes that cannot be gated, and why.
REFUSED: Mapping[str, str] = {
    "StableDiffusionInstructPix2PixPipeline": _THREE_WAY,
    "StableDiffusionXLInstructPix2PixPipeline": _THREE_WAY,
    "LEditsPPPipelineStableDiffusion": _THREE_WAY,
    "LEditsPPPipelineStableDiffusionXL": _THREE_WAY,
    "StableDiffusionPanoramaPipeline": _SEVERAL_CALLS,
    "StableDiffusionSAGPipeline": _ATTENTION_MAPS,
    "StableDiffusionAttendAndExcitePipeline": _ATTENTION_MAPS,
    "StableDiffusionDiffEditPipeline": _SEVERAL_CALLS,
    "StableDiffusionGLIGENPipeline": _ATTENTION_MAPS,
    "StableDiffusionGLIGENTextImagePipeline": _ATTENTION_MAPS,
}

#: Base classes of pipelines that cannot be gated, and why.
REFUSED_BASES: Mapping[str, str] = {"PAGMixin": _PERTURBED}

#: Denoiser classes with joint attention: text and image tokens in one sequence, so that there is nothing to cache.
JOINT_ATTENTION = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "BriaTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "MochiTransformer3DModel",
        "OmniGenTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "ZImageTransformer2DModel",
    }
)


def refusal(pipeline: type) -> str | None:
    """Why pipelines of class `pipeline` cannot be gated; None if nothing speaks against it."""
    for base in pipeline.__mro__:
        reason = REFUSED.get(base.__name__) or REFUSED_BASES.get(base.__name__)
        if reason is not None:
            return reason
    return None


def family_of(pipeline: type) -> Family:
    """The facts about class `pipeline`."""
    return FAMILIES.get(pipeline.__name__, Family())
