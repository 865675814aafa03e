"""What is specific to a family of pipelines: one row of data each, no code elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The components that may be a pipeline's denoiser, in the order in which they are looked for.
DENOISER_NAMES = ("unet", "transformer")


@dataclass(frozen=True)
class Family:
    """Facts about one pipeline class.

    Attributes:
        interleaved: inputs whose rows alternate between the halves, [uncond, cond, uncond, cond, ...],
            instead of being [uncond...; cond...]; each a path of keywords in the denoiser's call.
    """

    interleaved: tuple[tuple[str, ...], ...] = ()


# `StableDiffusionXLPipeline.__call__` concatenates the negative and positive time ids *before* it repeats them
# for the batch, and so does its ControlNet sibling; the other SDXL pipelines repeat first.
_SDXL = Family(interleaved=(("added_cond_kwargs", "time_ids"),))

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLControlNetPipeline": _SDXL,
    "StableDiffusionXLAdapterPipeline": _SDXL,
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
