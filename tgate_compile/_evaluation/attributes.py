"""What the embedded pipeline's images show, by the attribute reader that comes with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from tgate_compile._demo.attribute_reader import WEIGHTS, AttributeReader, targets_of
from tgate_compile._demo.captions import parse_caption
from tgate_compile._demo.rendering import IMAGE_SIZE, render
from tgate_compile._evaluation.features import Features
from tgate_compile._evaluation.weights import sha256_of

#: Drawn scenes per caption, for the Frechet distance.
DRAWINGS = 8


def are_captions(prompts: Sequence[str]) -> bool:
    """Whether the reader understands all prompts."""
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except ValueError:
        return False
    return True


def can_be_read(image: Image.Image) -> bool:
    """Whether the reader takes images of this size."""
    return image.size == (IMAGE_SIZE, IMAGE_SIZE)


def reader_features(reader: AttributeReader) -> Features:
    """What the reader's heads look at."""
    about = {"network": "attribute reader", "sha256": sha256_of(WEIGHTS), "size": IMAGE_SIZE}
    return Features("reader", reader.features, lambda image: image, about)


def right(reader: AttributeReader, pixels: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """1.0 for each image that shows all its caption says, [captions], from pixels in [0, 1]."""
    return torch.tensor([reader.score(pixels[i : i + 1], [caption])["all"] for i, caption in enumerate(captions)])


@torch.no_grad()
def log_likelihood(reader: AttributeReader, pixels: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """The reader's log-likelihood of all that the caption says, in nats, [captions], from pixels in [0, 1]."""
    scores = {name: head.log_softmax(1) for name, head in reader(pixels).items()}
    targets = [targets_of(parse_caption(caption)) for caption in captions]
    return torch.stack(
        [sum((scores[name][i, at] for name, at in t.items()), torch.tensor(0.0)) for i, t in enumerate(targets)]
    )


def drawings(captions: Sequence[str], each: int, seed: int) -> torch.Tensor:
    """Drawn scenes, uint8 [each * captions, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    scenes = [parse_caption(caption) for caption in captions]
    return torch.from_numpy(np.stack([render(scene, rng) for _ in range(each) for scene in scenes])).permute(0, 3, 1, 2)
