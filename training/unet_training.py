"""What a denoiser is trained with, and where its state is kept."""

from __future__ import annotations

from dataclasses import dataclass

LATEST = "latest.pt"  # the checkpoint to go on from


@dataclass(frozen=True)
class UNetTraining:
    """Everything the result depends on, apart from the speed of the machine."""

    family: str = "sd"
    minutes: float = 90.0
    batch: int = 32  # per worker
    images: int = 24_000  # per worker, rendered and encoded before the first step
    pair_share: float = 0.25
    learning_rate: float = 1.2e-3
    ema_decay: float = 0.998
    caption_dropout: float = 0.1
    seed: int = 0
