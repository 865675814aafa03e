"""Training configurations of the denoisers."""

from __future__ import annotations

from dataclasses import dataclass

LATEST = "latest.pt"  # the checkpoint to continue from


@dataclass(frozen=True)
class UNetTraining:
    """The configuration of a training run: everything the result depends on, except the speed of the machine."""

    family: str = "sd"
    minutes: float = 90.0  # processor time per worker
    batch: int = 32  # per worker
    images: int = 24_000  # per worker, rendered and encoded before the first step
    pair_share: float = 0.25
    learning_rate: float = 1.2e-3
    ema_decay: float = 0.998
    caption_dropout: float = 0.1
    seed: int = 0


DEFAULTS: dict[str, UNetTraining] = {
    "sd": UNetTraining(),
    # Initialized with the weights of the embedded UNet.
    "sdxl": UNetTraining("sdxl", minutes=8.0, images=12_000, pair_share=0.5, learning_rate=6e-4),
    # Trained from scratch. A single worker makes twice as many steps with half the batch.
    "pixart": UNetTraining("pixart", minutes=80.0, images=40_000, pair_share=0.5, learning_rate=1e-3, ema_decay=0.999),
    # Trained from scratch by two workers.
    "sd3": UNetTraining("sd3", minutes=22.0, images=12_000, pair_share=0.5),
    # The averaged model is the target of the distillation, so it must follow quickly. Guidance is distilled, which
    # replaces caption dropout.
    "lcm": UNetTraining(
        "lcm", minutes=4.0, images=8_000, pair_share=0.5, learning_rate=3e-4, ema_decay=0.98, caption_dropout=0.0
    ),
}
