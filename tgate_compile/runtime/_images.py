"""From latents to images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tgate_compile._bundle.manifest import VaeDecoder
from tgate_compile.runtime._noise_levels import Array
from tgate_compile.runtime._session import Session, Settings, ort_value

if TYPE_CHECKING:
    from PIL.Image import Image


class Decoder:
    """The VAE's decoder of a bundle."""

    def __init__(self, spec: VaeDecoder, folder: Path, settings: Settings) -> None:
        self._spec = spec
        self._session = Session(folder / spec.file, spec.inputs, spec.outputs, settings)

    def __call__(self, latents: Array) -> Array:
        """Images from 0 to 1, float32, [images, height, width, 3], of `latents`, [images, channels, h, w]."""
        (spec,) = self._spec.inputs
        scaled = latents / self._spec.scaling_factor + self._spec.shift_factor
        (images,) = self._session.run({spec.name: ort_value(scaled, spec)})
        black, white = self._spec.image_range
        shown: Array = ((images.numpy().astype(np.float32) - black) / (white - black)).clip(0, 1)
        return shown.transpose(0, 2, 3, 1)


def pil_images(images: Array) -> list[Image]:
    """`images`, [images, height, width, 3], from 0 to 1, as pictures."""
    from PIL import Image

    return [Image.fromarray(image) for image in (images * 255).round().astype(np.uint8)]
