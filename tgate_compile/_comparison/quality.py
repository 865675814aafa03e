"""How far an image is from the plain pipeline's, and whether it shows what it should."""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image

from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import parse_caption
from tgate_compile._installed import is_installed


def psnr(image: Image, plain: Image) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit images in dB; None if they are identical."""
    error = float(np.mean((_pixels(image) - _pixels(plain)) ** 2))
    return 10 * float(np.log10(1 / error)) if error else None


def ssim(image: Image, plain: Image) -> float | None:
    """Structural similarity, 1 for identical images; None if torchmetrics is not installed."""
    if not is_installed("torchmetrics"):
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, other = (torch.from_numpy(_pixels(each)).permute(2, 0, 1)[None] for each in (image, plain))
    return float(structural_similarity_index_measure(one, other, data_range=1.0))  # type: ignore[arg-type]


class Judge:
    """Says whether images of the embedded models show all that their captions say."""

    def __init__(self) -> None:
        self._reader = AttributeReader.load()

    def says(self, image: Image, caption: str) -> bool | None:
        """None if the caption is no caption of theirs, or the image is too large or too small."""
        try:
            parse_caption(caption)
        except ValueError:
            return None
        return self._reader.score([image], [caption])["all"] == 1.0 if image.size == (64, 64) else None


def _pixels(image: Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """[height, width, 3], in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255
