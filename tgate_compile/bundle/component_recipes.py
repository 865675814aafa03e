"""Describe the arguments of denoisers: how often they change, and how pipelines compute them from a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from diffusers import AutoencoderKL, DiffusionPipeline

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.bundle.manifest import Source
from tgate_compile.passes.graphs import Binding

#: The names that denoisers have for their timestep.
TIMESTEPS = ("timestep", "timesteps", "t")

#: The arguments, by their names in bundles, that stay the same for a generation. `engine/halves.py` knows more names,
#: but a running pipeline compares arguments with those of the call before; other runtimes may rely on this list.
FIXED = frozenset(
    {
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_t5",
        "encoder_hidden_states_image",
        "text_embedding_mask",
        "text_embedding_mask_t5",
        "pooled_projections",
        "guidance",
        "timestep_cond",
        "image_meta_size",
        "style",
        "img_ids",
        "txt_ids",
        "added_cond_kwargs.text_embeds",
        "added_cond_kwargs.time_ids",
        "added_cond_kwargs.resolution",
        "added_cond_kwargs.aspect_ratio",
    }
)


def binding_in_bundle(name: str) -> Binding:
    """Return how often the argument called `name` in a bundle changes; at every call unless it is certain."""
    if name in FIXED:
        return "prompt"
    return "timestep" if name in TIMESTEPS else "latents"


#: Arguments of the pipeline's call that change how a prompt or the latents are processed, which the runtime lacks.
LEFT_OUT = (
    "clip_skip",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
    "skip_guidance_layers",
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
    """The facts that are specific to a pipeline class.

    Attributes:
        encoders: the text encoders and their tokenizers, by the pipeline's names for them.
        hidden_state: which of an encoder's hidden states is used: -1 for the last one, -2 for the input of the last
            layer.
        sources: the source of each argument of the denoiser, by the name in the bundle.
        pooled: the encoders whose pooled outputs are used, too.
        masked: whether the encoders receive a mask for the padding.
        lower_case: whether prompts are stripped and converted to lower case.
        length: the parameter of the pipeline's call that sets the number of tokens; None if the tokenizer sets it.
        upcasts_vae: whether a float16 VAE is converted to float32 if its configuration asks for it.
        shifts_latents: whether the VAE's shift factor is added to the latents before they are decoded.
        without: text encoders that must be missing, each with the parameter of the pipeline's call that sets how many
            zero tokens replace its output, which must be 0.
    """

    encoders: Mapping[str, str]
    hidden_state: Literal[-1, -2]
    sources: Mapping[str, Source]
    pooled: tuple[str, ...] = ()
    masked: bool = False
    lower_case: bool = False
    length: str | None = None
    upcasts_vae: bool = False
    shifts_latents: bool = False
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ComponentsRequest:
    """A request for `components="all"`.

    Attributes:
        pipeline: the class of the pipeline.
        recipe: the recipe for the pipeline.
        call: the arguments of the pipeline's call that the bundle is exported with.
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
        pooled=("text_encoder_2",),
        upcasts_vae=True,
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "StableDiffusion3Pipeline": Recipe(
        {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
        -2,
        {
            "hidden_states": "latents",
            "timestep": "timestep",
            "encoder_hidden_states": "hidden_states",
            "pooled_projections": "pooled",
        },
        pooled=("text_encoder", "text_encoder_2"),
        shifts_latents=True,
        without={"text_encoder_3": "max_sequence_length"},
    ),
}


def recipe_for(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Recipe:
    """Return the recipe for `pipe`, after checking that the pipeline has the components it needs.

    Raises:
        UnsupportedModelError: this class has no recipe, or the pipeline or `call` does not fit the recipe.
    """
    pipeline = type(pipe).__name__
    if pipeline not in RECIPES:
        raise UnsupportedModelError(
            f'components="all" supports {", ".join(RECIPES)}, but this is a {pipeline}. Export only the denoiser '
            '(components="denoiser"), and encode prompts and decode latents by other means.'
        )
    recipe = RECIPES[pipeline]
    for name in LEFT_OUT:
        if call.get(name):
            raise UnsupportedModelError(
                f'components="all" does not support {name}={call[name]!r}: the runtime has no such option. Leave it '
                'out, or export only the denoiser (components="denoiser").'
            )
    for name, length in recipe.without.items():
        default = inspect.signature(type(pipe).__call__).parameters[length].default
        if getattr(pipe, name, None) is not None or call.get(length, default) != 0:
            raise UnsupportedModelError(
                f'components="all" supports {pipeline} only without {name}. Load the pipeline with {name}=None, and '
                f'put {length}=0 into `call`, or export only the denoiser (components="denoiser").'
            )
    recipe = replace(recipe, encoders=_present(pipe, recipe))
    for encoder, tokenizer in recipe.encoders.items():
        if getattr(pipe, encoder, None) is None:
            _refuse(pipe, encoder, "a text encoder")
        if not hasattr(getattr(pipe, tokenizer, None), "backend_tokenizer"):
            _refuse(pipe, tokenizer, "a tokenizer of the tokenizers library")
        if getattr(getattr(pipe, encoder).config, "use_attention_mask", False) and not recipe.masked:
            _refuse(pipe, encoder, "a text encoder that needs no attention mask")
    if not isinstance(getattr(pipe, "vae", None), AutoencoderKL):
        _refuse(pipe, "vae", "an AutoencoderKL")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        _refuse(pipe, "vae", "an AutoencoderKL without latents_mean")
    return recipe


def check_arguments(pipe: DiffusionPipeline, recipe: Recipe, arguments: Collection[str]) -> None:
    """Raise UnsupportedModelError unless `recipe` has a source for each of the denoiser's `arguments`."""
    unknown = [name for name in arguments if name not in recipe.sources]
    if unknown:
        raise UnsupportedModelError(
            f"The denoiser of this {type(pipe).__name__} is called with {', '.join(unknown)}, which "
            'components="all" cannot compute from a prompt (an adapter or a ControlNet, for example). Export only the '
            'denoiser (components="denoiser").'
        )


def _present(pipe: DiffusionPipeline, recipe: Recipe) -> dict[str, str]:
    """Return the text encoders that are present; all but the last may be missing, as SDXL's first one may be."""
    *others, last = recipe.encoders.items()
    present = [pair for pair in others if any(getattr(pipe, name, None) is not None for name in pair)]
    return dict([*present, last])


def _refuse(pipe: DiffusionPipeline, name: str, expected: str) -> None:
    given = type(getattr(pipe, name, None)).__name__
    raise UnsupportedModelError(
        f'components="all" needs {name} to be {expected}, but in this {type(pipe).__name__} it is {given}.'
    )
