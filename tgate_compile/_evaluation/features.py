"""Features of images, for Frechet distances, and statistics of them in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tgate_compile._errors import ConfigurationError
from tgate_compile._evaluation.frechet import Statistics
from tgate_compile._evaluation.inception import Inception
from tgate_compile._evaluation.weights import INCEPTION, sha256_of

BATCH = 16
ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

MSG_REFERENCE = (
    "fid_reference must be a folder with at least two images ({endings}), or an .npz file of their statistics, but got "
    "{given}."
)


@dataclass(frozen=True)
class Features:
    """How features are made of images.

    Attributes:
        name: of the features.
        extract: from pixels in [0, 1], [batch, 3, height, width], to [batch, features].
        prepare: from an image to one of the size that is looked at.
        about: what they depend on; statistics are kept as long as it is the same.
    """

    name: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    prepare: Callable[[Image.Image], Image.Image]
    about: Mapping[str, Any]

    def of(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Of each image, [images, features]."""
        found: list[torch.Tensor] = []
        batch: list[Image.Image] = []
        for image in images:
            batch.append(self.prepare(image))
            if len(batch) == BATCH:
                found.append(self.extract(pixels_of(batch)).cpu())
                batch = []
        if batch:
            found.append(self.extract(pixels_of(batch)).cpu())
        return torch.cat(found)

    def statistics(
        self, folder: Path, name: str, images: Callable[[], Iterable[Image.Image]], about: Mapping[str, Any]
    ) -> Statistics:
        """Those in `folder`, or, if there are none of the same images by the same features, new ones, kept there."""
        record = {"features": dict(self.about), **about}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        path = folder / f"{name}.{self.name}.{key}.npz"
        if path.exists():
            return Statistics.load(path)
        statistics = Statistics.of(self.of(images()), record)
        statistics.save(path)
        return statistics


def inception_features(weights: Path, size: int, device: torch.device) -> Features:
    """pytorch-fid's, of images that are resized to `size` x `size` pixels, as in the paper.

    Raises:
        ConfigurationError: the file has other weights.
    """
    network = Inception()
    tensors = {name: value for name, value in INCEPTION.load(weights).items() if not name.startswith("fc.")}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise INCEPTION.refused(weights, error) from error
    network.eval().requires_grad_(False).to(device)

    def prepare(image: Image.Image) -> Image.Image:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)

    about = {
        "network": "pytorch-fid Inception",
        "sha256": sha256_of(weights),
        "size": size,
        "resize": "bicubic, no crop",
    }
    return Features("inception", lambda pixels: network(pixels.to(device)), prepare, about)


def reference_statistics(given: Path, features: Features, folder: Path) -> Statistics:
    """Those of the real images that generated ones are compared with.

    Args:
        given: a folder of images, or an .npz file with statistics of theirs.
        features: how to make them, if they are not there.
        folder: where to keep them.

    Raises:
        ConfigurationError: there are no images, or no statistics.
    """
    if given.suffix == ".npz":
        return Statistics.load(given)
    files = sorted(path for path in given.rglob("*") if path.suffix.lower() in ENDINGS) if given.is_dir() else []
    if len(files) < 2:
        raise ConfigurationError(MSG_REFERENCE.format(endings=", ".join(ENDINGS), given=given))
    listing = hashlib.sha256()
    for path in files:
        listing.update(f"{path.relative_to(given).as_posix()} {path.stat().st_size}\n".encode())
    about = {"folder": str(given), "images": len(files), "listing": listing.hexdigest()}
    return features.statistics(folder, "reference", lambda: _opened(files), about)


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pixels in [0, 1], [batch, 3, height, width], of images of the same size."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def _opened(files: Iterable[Path]) -> Iterable[Image.Image]:
    for path in files:
        with Image.open(path) as image:
            yield image.convert("RGB")
