"""What every text encoder is trained for: its tokens tell the scene, and of a pair two of them one object each."""

from __future__ import annotations

import torch

from tgate_compile._demo.captions import Scene
from training.targets import SLOT_HEADS, TEXT_HEADS, slot_targets, text_targets


class TextHeads(torch.nn.Module):
    """One linear reader per attribute; they are thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, n) for name, n in (TEXT_HEADS | SLOT_HEADS).items()}
        )
        self.accuracy: dict[str, float] = {}  # running means

    def loss(self, hidden: torch.Tensor, tells: torch.Tensor, slots: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Cross entropy, summed over the heads.

        Args:
            hidden: the encoder's output, [batch, tokens, width].
            tells: the tokens that have to tell the whole scene, bool [batch, tokens].
            slots: the outputs that have to tell one object each, [batch, 2, width]; only pairs count.
            scenes: one per caption.
        """
        places = tells.nonzero()[:, 0]  # which caption each of those tokens belongs to
        is_pair = torch.tensor([len(scene.objects) == 2 for scene in scenes], device=hidden.device)
        wanted = {name: target.to(hidden.device)[places] for name, target in text_targets(scenes).items()}
        wanted |= slot_targets([scene for scene in scenes if len(scene.objects) == 2])
        loss = torch.zeros((), device=hidden.device)
        for name, target in wanted.items():
            seen = slots[is_pair].flatten(0, 1) if name in SLOT_HEADS else hidden[tells]
            prediction, target = (
                self.heads[name](seen),
                target.to(hidden.device).flatten(),
            )  # [tokens, classes], [tokens]
            loss = loss + torch.nn.functional.cross_entropy(prediction, target)
            right = float((prediction.argmax(1) == target).float().mean())
            self.accuracy[name] = 0.95 * self.accuracy.get(name, 0.0) + 0.05 * right
        return loss
