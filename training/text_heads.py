"""The training objective of all text encoders: the scene can be read from their output tokens.

For pairs, two of the tokens must additionally describe one object each.
"""

from __future__ import annotations

import torch

from tgate_compile._demo.captions import Scene
from training.targets import SLOT_HEADS, TEXT_HEADS, slot_targets, text_targets


class TextHeads(torch.nn.Module):
    """One linear classifier per attribute; they are discarded after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, n) for name, n in (TEXT_HEADS | SLOT_HEADS).items()}
        )
        self.accuracy: dict[str, float] = {}  # running means

    def loss(
        self, hidden: torch.Tensor, selected: torch.Tensor, slots: torch.Tensor, scenes: list[Scene]
    ) -> torch.Tensor:
        """Return the cross entropy, summed over the heads.

        Args:
            hidden: output of the encoder, [batch, tokens, width].
            selected: tokens that must describe the whole scene, bool [batch, tokens].
            slots: outputs that must describe one object each, [batch, 2, width]; used for pairs only.
            scenes: scenes, one per caption.
        """
        places = selected.nonzero()[:, 0]  # the caption that each of these tokens belongs to
        is_pair = torch.tensor([len(scene.objects) == 2 for scene in scenes], device=hidden.device)
        targets = {name: target.to(hidden.device)[places] for name, target in text_targets(scenes).items()}
        targets |= slot_targets([scene for scene in scenes if len(scene.objects) == 2])
        loss = torch.zeros((), device=hidden.device)
        for name, target in targets.items():
            seen = slots[is_pair].flatten(0, 1) if name in SLOT_HEADS else hidden[selected]
            prediction, target = (
                self.heads[name](seen),
                target.to(hidden.device).flatten(),
            )  # [tokens, classes], [tokens]
            loss = loss + torch.nn.functional.cross_entropy(prediction, target)
            right = float((prediction.argmax(1) == target).float().mean())
            self.accuracy[name] = 0.95 * self.accuracy.get(name, 0.0) + 0.05 * right
        return loss
