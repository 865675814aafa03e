"""Make batches of rendered scenes and captions."""

from __future__ import annotations

import numpy as np
import torch

from tgate_compile._demo.captions import WORDINGS, Scene, caption_of, random_scene, render


def random_scenes(rng: np.random.Generator, n: int, pair_share: float) -> list[Scene]:
    """Return `n` scenes of the training split, of which a fraction of about `pair_share` has two objects."""
    return [random_scene(rng, 2 if rng.random() < pair_share else 1) for _ in range(n)]


def random_captions(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """Return a caption for each scene, in a random wording."""
    return [caption_of(scene, int(rng.integers(WORDINGS))) for scene in scenes]


def images_of(scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Return rendered scenes as floats in [-1, 1], [batch, 3, 64, 64]."""
    pixels = np.stack([render(scene, rng) for scene in scenes])  # [batch, 64, 64, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
