"""The embedded models, which follow simple captions, and their default settings.

Only the table of models is here, to keep ``import tgate_compile`` fast. Import everything else from the modules, for
example ``from tgate_compile._demo.pipeline import load_demo_pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tgate_compile._errors import ConfigurationError


@dataclass(frozen=True)
class DemoVariant:
    """An embedded model.

    Attributes:
        pipeline: name of the diffusers pipeline class.
        folder: folder with the model's own components, in this folder.
        shared: components loaded from the folders of other models, with their folders, in this folder.
        steps: number of denoising steps.
        guidance: guidance scale.
        call: arguments that the pipeline's call needs to make images of this size.
        absent: components of the pipeline class that the model does not have.
    """

    pipeline: str
    folder: str
    steps: int
    guidance: float
    shared: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, object] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


_VAE = {"vae": "weights/vae"}
_CLIP = {"text_encoder": "weights/text_encoder", "tokenizer": "weights/tokenizer"}
_SCHEDULER = {"scheduler": "weights/scheduler"}
_TWO_TOKENIZERS = dict.fromkeys(("tokenizer", "tokenizer_2"), "weights/tokenizer")
_TWO_TEXT_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2"), "weights_sdxl/text_encoder_2")

DEMO_VARIANTS: Mapping[str, DemoVariant] = MappingProxyType(
    {
        "sd": DemoVariant("StableDiffusionPipeline", "weights", 25, 5.0),
        "sdxl": DemoVariant(
            "StableDiffusionXLPipeline",
            "weights_sdxl",
            25,
            5.0,
            shared=_VAE | _SCHEDULER | {"tokenizer_2": "weights/tokenizer"},
        ),
        "pixart": DemoVariant(
            "PixArtAlphaPipeline",
            "weights_pixart",
            25,
            3.0,
            shared=_VAE | _SCHEDULER,
            # Its list of image sizes starts at 256 pixels, and cleaning captions needs additional packages.
            call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16},
        ),
        "lcm": DemoVariant("LatentConsistencyModelPipeline", "weights_lcm", 4, 5.0, shared=_VAE | _CLIP),
        "sd3": DemoVariant(
            "StableDiffusion3Pipeline",
            "weights_sd3",
            25,
            4.5,
            shared=_VAE | _TWO_TOKENIZERS | _TWO_TEXT_ENCODERS,
            # Without T5, the pipeline replaces its tokens by as many zeros.
            call={"max_sequence_length": 0},
            absent=("text_encoder_3", "tokenizer_3"),
        ),
    }
)


def demo_variant(name: str) -> DemoVariant:
    """Return the embedded model called `name`.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in DEMO_VARIANTS:
        raise ConfigurationError(f"The embedded model must be one of {', '.join(DEMO_VARIANTS)}, but got {name!r}.")
    return DEMO_VARIANTS[name]
