"""LPIPS with AlexNet's features, for weights in a file.

torchmetrics and lpips build AlexNet by torchvision, whose builds have to match torch's, and fetch its weights from the
network. The five convolutions are written down here; the weights of the comparison come with torchmetrics.

Source: arXiv 1801.03924, and the lpips package 0.1.4 (version 0.1 of its weights, `net="alex"`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The distance of images, 0 for the same ones.

    Args:
        alexnet: torchvision's weights of AlexNet, by its names.
    """

    def __init__(self, alexnet: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        own = {name: value for name, value in alexnet.items() if name.startswith("features.")}
        self.load_state_dict(own)
        for index, weight in enumerate(_comparison_weights()):
            self.register_buffer(f"comparison_{index}", weight)  # [1, channels, 1, 1]
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances, [batch], of pixels in [0, 1], [batch, 3, height, width]."""
        total = torch.zeros(a.shape[0], device=a.device)
        for index, (x, y) in enumerate(zip(self._activations(a), self._activations(b), strict=True)):
            difference = (_normalized(x) - _normalized(y)) ** 2
            total = total + F.conv2d(difference, self.get_buffer(f"comparison_{index}")).mean((1, 2, 3))
        return total

    def _activations(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        x = (2 * pixels - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _comparison_weights() -> list[torch.Tensor]:
    import torchmetrics.functional.image as image_metrics

    path = Path(image_metrics.__file__).parent / "lpips_models" / "alex.pth"
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return [weights[f"lin{index}.model.1.weight"] for index in range(5)]
