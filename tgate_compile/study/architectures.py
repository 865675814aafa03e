"""Models of real size, without weights: the architecture of the denoiser and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tgate_compile._errors import ConfigurationError


@dataclass(frozen=True)
class Geometry:
    """The size of one denoiser call.

    Attributes:
        batch: batch size as the denoiser sees it: twice the number of images under guidance.
        height: height of the image in pixels.
        width: width of the image in pixels.
        text: the number of the text's tokens, for a model with joint attention.
    """

    batch: int
    height: int
    width: int
    text: int = 0


#: The dimensions of one input; None: the input is None. Strings stand for the batch, the size of the latents, the
#: number of patches of 2 x 2 latents, and the number of the text's tokens.
Shape = tuple[int | str, ...] | None


@dataclass(frozen=True, eq=False)
class Architecture:
    """A denoiser and the inputs of its call. Compared by identity, because models may share one architecture.

    Attributes:
        denoiser_class: name of the denoiser's class in diffusers.
        config: the configuration of the published checkpoint, without values that are the class's defaults.
        inputs: the shapes of the call's inputs; may be nested by one level of dicts.
        size: height and width, in pixels, of the images the model was trained on.
        constants: arguments of the call that are not tensors, or a function that returns them.
        text: the number of the text's tokens, for a model with joint attention; 0 for others.
    """

    denoiser_class: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Shape | Mapping[str, Shape]]
    size: int
    constants: Mapping[str, Any] | Callable[[Geometry], Mapping[str, Any]] = field(default_factory=dict)
    text: int = 0

    @property
    def is_joint(self) -> bool:
        """Whether text and latents share their attentions."""
        return self.text > 0

    @property
    def denoiser(self) -> type[Any]:
        """The denoiser's class."""
        import diffusers  # not above: the command line reads the table for its help

        found: type[Any] = getattr(diffusers, self.denoiser_class)
        return found


@dataclass(frozen=True)
class Model:
    """A model as the paper's tables use it.

    Attributes:
        architecture: the denoiser.
        steps: number of denoising steps.
        guided: whether guidance is on, which doubles the batch.
        apart: whether the halves are evaluated in calls of their own, at the same cost.
    """

    architecture: Architecture
    steps: int = 25
    guided: bool = True
    apart: bool = False

    @property
    def rows(self) -> int:
        """The batch size of a call for one image."""
        return 2 if self.guided and not self.apart else 1


_LATENTS: Shape = ("batch", 4, "height", "width")


def _unet(size: int, text: Shape, inputs: Mapping[str, Shape | Mapping[str, Shape]], **config: Any) -> Architecture:
    call = {"sample": _LATENTS, "timestep": (), "encoder_hidden_states": text, **inputs}
    return Architecture("UNet2DConditionModel", config, call, size)


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
# The guidance scale is a separate input, embedded in the same way as the timestep.
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
    return Architecture("PixArtTransformer2DModel", {**shared, **config}, inputs, 1024)


_PIXART_ALPHA = _pixart(120, {"resolution": ("batch", 2), "aspect_ratio": ("batch", 1)})
_PIXART_SIGMA = _pixart(300, {"resolution": None, "aspect_ratio": None}, use_additional_conditions=False)

#: Models by name in the paper's tables (paper_tables.json).
MODELS: Mapping[str, Model] = {
    "sd15": Model(_SD15),
    "sd21": Model(_SD21),
    "sdxl": Model(_SDXL),
    "pixart_alpha": Model(_PIXART_ALPHA),
    "pixart_sigma": Model(_PIXART_SIGMA),
    "lcm_sdxl": Model(_LCM_SDXL, steps=4, guided=False),
    "lcm_pixart_alpha": Model(_PIXART_ALPHA, steps=4, guided=False),
}


def _sd3(text: int, **config: Any) -> Architecture:
    """Return a version of Stable Diffusion 3; its prompts have 77 tokens of CLIP and up to 256 of T5."""
    inputs: dict[str, Shape | Mapping[str, Shape]] = {
        "hidden_states": ("batch", 16, "height", "width"),
        "encoder_hidden_states": ("batch", "text", 4096),
        "pooled_projections": ("batch", 2048),
        "timestep": ("batch",),
    }
    return Architecture("SD3Transformer2DModel", config, inputs, 1024, text=text)


_SD3_MEDIUM = _sd3(
    333, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)  # fmt: skip
_SD35_MEDIUM = _sd3(
    333, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
_SD35_LARGE = _sd3(
    333, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
)
_FLUX1_DEV = Architecture(
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    {
        "hidden_states": ("batch", "patches", 64),
        "encoder_hidden_states": ("batch", "text", 4096),
        "pooled_projections": ("batch", 768),
        "timestep": ("batch",),
        "img_ids": ("patches", 3),
        "txt_ids": ("text", 3),
        "guidance": ("batch",),
    },
    1024,
    text=512,
)
_FLUX2_DEV = Architecture(
    "Flux2Transformer2DModel",
    {},
    {
        "hidden_states": ("batch", "patches", 128),
        "encoder_hidden_states": ("batch", "text", 15360),
        "timestep": ("batch",),
        "img_ids": ("batch", "patches", 4),
        "txt_ids": ("batch", "text", 4),
        "guidance": ("batch",),
    },
    1024,
    text=512,
)
_QWEN_IMAGE = Architecture(
    "QwenImageTransformer2DModel",
    {},
    {
        "hidden_states": ("batch", "patches", 64),
        "encoder_hidden_states": ("batch", "text", 3584),
        "encoder_hidden_states_mask": ("batch", "text"),
        "timestep": ("batch",),
    },
    1024,
    constants=lambda geometry: {"img_shapes": [[(1, geometry.height // 16, geometry.width // 16)]] * geometry.batch},
    text=128,
)

#: Models with joint attention, at the numbers of steps that their cards or pipelines recommend. FLUX has been distilled
#: with guidance; Qwen-Image evaluates its guidance in separate calls.
JOINT_MODELS: Mapping[str, Model] = {
    "sd3_medium": Model(_SD3_MEDIUM, steps=28),
    "sd35_medium": Model(_SD35_MEDIUM, steps=40),
    "sd35_large": Model(_SD35_LARGE, steps=28),
    "flux1_dev": Model(_FLUX1_DEV, steps=28, guided=False),
    "flux2_dev": Model(_FLUX2_DEV, steps=28, guided=False),
    "qwen_image": Model(_QWEN_IMAGE, steps=50, apart=True),
}
#: All models whose cost can be counted.
ALL_MODELS: Mapping[str, Model] = {**MODELS, **JOINT_MODELS}


def model_named(name: str, models: Mapping[str, Model] = MODELS) -> Model:
    """Return the model called `name` among `models`.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in models:
        raise ConfigurationError(f"The model must be one of {', '.join(models)}, but got {name!r}.")
    return models[name]


#: Image pixels per latent in each direction; the same for the autoencoders of all models.
PIXELS_PER_LATENT = 8
