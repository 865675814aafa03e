"""The real models as rows of data: what to build on the meta device, and what one call of it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from tgate_compile._errors import ConfigurationError

MSG_MODEL = "The model must be one of {known}, but got {given!r}."

#: Dimensions of one input; the words stand for the batch, and for the size of the latents. None: the input is None.
Shape = tuple[int | str, ...] | None


@dataclass(frozen=True, eq=False)
class Architecture:
    """A denoiser and its call. Compared by identity: two models may have the very same one.

    Attributes:
        denoiser: its class.
        config: its configuration, as in the published checkpoint; what is the class's default is left out.
        inputs: the shapes of its call's inputs, one level of dicts included.
        size: height and width of the image that it was trained for, in pixels.
    """

    denoiser: type[Any]
    config: Mapping[str, Any]
    inputs: Mapping[str, Shape | Mapping[str, Shape]]
    size: int


@dataclass(frozen=True)
class Model:
    """A model as the paper's tables use it.

    Attributes:
        architecture: see there.
        steps: denoising steps.
        guided: whether guidance runs, at twice the batch.
    """

    architecture: Architecture
    steps: int = 25
    guided: bool = True


_LATENTS: Shape = ("batch", 4, "height", "width")


def _unet(size: int, text: Shape, inputs: Mapping[str, Shape | Mapping[str, Shape]], **config: Any) -> Architecture:
    call = {"sample": _LATENTS, "timestep": (), "encoder_hidden_states": text, **inputs}
    return Architecture(UNet2DConditionModel, config, call, size)


_SD15 = _unet(512, ("batch", 77, 768), {}, cross_attention_dim=768)
_SD21 = _unet(
    768, ("batch", 77, 1024), {}, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)  # fmt: skip
_SDXL = _unet(
    1024,
    ("batch", 77, 2048),
    {"added_cond_kwargs": {"text_embeds": ("batch", 1280), "time_ids": ("batch", 6)}},
    cross_attention_dim=2048,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# The guidance scale is an input of its own, embedded as the timestep is.
_LCM_SDXL = replace(
    _SDXL,
    config={**_SDXL.config, "time_cond_proj_dim": 256},
    inputs={**_SDXL.inputs, "timestep_cond": ("batch", 256)},
)


def _pixart(tokens: int, conditions: Mapping[str, Shape], **config: Any) -> Architecture:
    inputs: dict[str, Shape | Mapping[str, Shape]] = {
        "hidden_states": _LATENTS,
        "encoder_hidden_states": ("batch", tokens, 4096),
        "timestep": ("batch",),
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": ("batch", tokens),
    }
    shared = {"sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 2}
    return Architecture(PixArtTransformer2DModel, {**shared, **config}, inputs, 1024)


_PIXART_ALPHA = _pixart(120, {"resolution": ("batch", 2), "aspect_ratio": ("batch", 1)})
_PIXART_SIGMA = _pixart(300, {"resolution": None, "aspect_ratio": None}, use_additional_conditions=False)

#: By the names of the paper's tables (paper_tables.json).
MODELS: Mapping[str, Model] = {
    "sd15": Model(_SD15),
    "sd21": Model(_SD21),
    "sdxl": Model(_SDXL),
    "pixart_alpha": Model(_PIXART_ALPHA),
    "pixart_sigma": Model(_PIXART_SIGMA),
    "lcm_sdxl": Model(_LCM_SDXL, steps=4, guided=False),
    "lcm_pixart_alpha": Model(_PIXART_ALPHA, steps=4, guided=False),
}


def model_named(name: str) -> Model:
    """The model of this name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in MODELS:
        raise ConfigurationError(MSG_MODEL.format(known=", ".join(MODELS), given=name))
    return MODELS[name]
