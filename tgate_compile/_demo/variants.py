"""The embedded models: what each is, and the settings it was measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tgate_compile._errors import ConfigurationError


@dataclass(frozen=True)
class DemoVariant:
    """One embedded model.

    Attributes:
        pipeline: the diffusers class that it is loaded as.
        folder: of its own parts, next to this file.
        shared: the parts that it takes from the folder `weights`, and the names they have there.
        steps: denoising steps.
        guidance: guidance scale.
        call: arguments without which its pipeline does not make images of this size.
    """

    pipeline: str
    folder: str
    steps: int
    guidance: float
    shared: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, object] = field(default_factory=dict)


_VAE = {"vae": "vae"}
_CLIP = {"text_encoder": "text_encoder", "tokenizer": "tokenizer"}
_SCHEDULER = {"scheduler": "scheduler"}

DEMO_VARIANTS: Mapping[str, DemoVariant] = MappingProxyType(
    {
        "sd": DemoVariant("StableDiffusionPipeline", "weights", 25, 5.0),
        "sdxl": DemoVariant(
            "StableDiffusionXLPipeline",
            "weights_sdxl",
            25,
            5.0,
            shared=_VAE | _SCHEDULER | {"tokenizer_2": "tokenizer"},
        ),
        "pixart": DemoVariant(
            "PixArtAlphaPipeline",
            "weights_pixart",
            25,
            3.0,
            shared=_VAE | _SCHEDULER,
            # Its list of image sizes begins at 256, and cleaning captions needs packages that this one does not.
            call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16},
        ),
        "lcm": DemoVariant("LatentConsistencyModelPipeline", "weights_lcm", 4, 5.0, shared=_VAE | _CLIP),
    }
)


def demo_variant(name: str) -> DemoVariant:
    """The embedded model of this name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in DEMO_VARIANTS:
        raise ConfigurationError(f"The embedded models are {', '.join(DEMO_VARIANTS)}, but got {name!r}.")
    return DEMO_VARIANTS[name]
