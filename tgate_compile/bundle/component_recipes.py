"""How pipelines make their denoiser's arguments of a prompt: a row for each class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import AutoencoderKL, DiffusionPipeline

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.bundle.manifest import Source

MSG_PIPELINE = (
    'components="all" knows the prompts of {known}, and this is a {given}. Export the denoiser alone, '
    'components="denoiser", and encode prompts and decode latents by other means.'
)
MSG_ARGUMENT = (
    'The denoiser of this {pipeline} is called with {names}, which components="all" cannot make of a prompt: an '
    'adapter, a ControlNet or the like. Export the denoiser alone, components="denoiser".'
)

#: Options of calls that change what is made of a prompt, or of the latents, and are not in the runtime.
LEFT_OUT = (
    "clip_skip",
    "prompt_2",
    "negative_prompt_2",
    "guidance_rescale",
    "eta",
    "timesteps",
    "sigmas",
    "denoising_end",
    "original_size",
    "target_size",
)


@dataclass(frozen=True)
class Recipe:
    """What is specific to a pipeline class.

    Attributes:
        encoders: its text encoders and their tokenizers, by the pipeline's names for them.
        hidden_state: which of an encoder's states is taken: -1 the last one, -2 the one before the last layer.
        sources: what each argument of the denoiser is, by the bundle's names for them.
        pooled: the last encoder's pooled output is used, too.
        masked: the encoders are told where the padding is.
        lower_case: prompts are stripped and put into lower case.
        length: the parameter of the pipeline's call that says how many tokens; None: the tokenizer says it.
        upcasts_vae: float16 weights of the VAE are used as float32, if its configuration asks for it.
    """

    encoders: Mapping[str, str]
    hidden_state: Literal[-1, -2]
    sources: Mapping[str, Source]
    pooled: bool = False
    masked: bool = False
    lower_case: bool = False
    length: str | None = None
    upcasts_vae: bool = False


@dataclass(frozen=True)
class ComponentsRequest:
    """What is asked for with `components="all"`.

    Attributes:
        pipeline: the pipeline's class.
        recipe: that of the pipeline.
        call: the arguments of the pipeline's call that the bundle is made with.
    """

    pipeline: type[DiffusionPipeline]
    recipe: Recipe
    call: Mapping[str, Any]


_UNET: Mapping[str, Source] = {"sample": "latents", "timestep": "timestep", "encoder_hidden_states": "hidden_states"}
_PIXART = Recipe(
    encoders={"text_encoder": "tokenizer"},
    hidden_state=-1,
    sources={
        "hidden_states": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "hidden_states",
        "encoder_attention_mask": "attention_mask",
        "added_cond_kwargs.resolution": "resolution",
        "added_cond_kwargs.aspect_ratio": "aspect_ratio",
    },
    masked=True,
    lower_case=True,
    length="max_sequence_length",
)
RECIPES: Mapping[str, Recipe] = {
    "StableDiffusionPipeline": Recipe({"text_encoder": "tokenizer"}, -1, _UNET),
    "StableDiffusionXLPipeline": Recipe(
        {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
        -2,
        {**_UNET, "added_cond_kwargs.text_embeds": "pooled", "added_cond_kwargs.time_ids": "sizes"},
        pooled=True,
        upcasts_vae=True,
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}


def recipe_for(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Recipe:
    """That of `pipe`, whose components are what it needs.

    Raises:
        UnsupportedModelError: there is none, or it does not fit.
    """
    pipeline = type(pipe).__name__
    if pipeline not in RECIPES:
        raise UnsupportedModelError(MSG_PIPELINE.format(known=", ".join(RECIPES), given=pipeline))
    recipe = RECIPES[pipeline]
    for name in LEFT_OUT:
        if call.get(name):
            raise UnsupportedModelError(
                f'components="all" cannot say {name}={call[name]!r}: the runtime has no such option. Leave it out, '
                'or export the denoiser alone, components="denoiser".'
            )
    recipe = replace(recipe, encoders=_present(pipe, recipe))
    for encoder, tokenizer in recipe.encoders.items():
        if getattr(pipe, encoder, None) is None:
            _refuse(pipe, encoder, "a text encoder")
        if not hasattr(getattr(pipe, tokenizer, None), "backend_tokenizer"):
            _refuse(pipe, tokenizer, "a tokenizer of the tokenizers library")
        if getattr(getattr(pipe, encoder).config, "use_attention_mask", False) and not recipe.masked:
            _refuse(pipe, encoder, "used without a mask for its padding")
    if not isinstance(getattr(pipe, "vae", None), AutoencoderKL):
        _refuse(pipe, "vae", "an AutoencoderKL")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        _refuse(pipe, "vae", "one without a mean of its latents")
    return recipe


def check_arguments(pipe: DiffusionPipeline, recipe: Recipe, arguments: Collection[str]) -> None:
    """Raise UnsupportedModelError unless `recipe` says what all `arguments` of the denoiser are."""
    unknown = [name for name in arguments if name not in recipe.sources]
    if unknown:
        raise UnsupportedModelError(MSG_ARGUMENT.format(pipeline=type(pipe).__name__, names=", ".join(unknown)))


def _present(pipe: DiffusionPipeline, recipe: Recipe) -> dict[str, str]:
    """Of several text encoders the first may be missing, with its tokenizer: SDXL then does with the second."""
    *others, last = recipe.encoders.items()
    present = [pair for pair in others if any(getattr(pipe, name, None) is not None for name in pair)]
    return dict([*present, last])


def _refuse(pipe: DiffusionPipeline, name: str, expected: str) -> None:
    given = type(getattr(pipe, name, None)).__name__
    raise UnsupportedModelError(
        f'components="all" needs a {name} that is {expected}, but this {type(pipe).__name__} has {given}.'
    )
