"""The attribute reader, which recognizes what an image of the embedded models shows and checks it against a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tgate_compile._demo.captions import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Colour,
    Position,
    Relation,
    Scene,
    SceneObject,
    parse_caption,
)

WEIGHTS = Path(__file__).parent / "weights" / "attribute_reader.safetensors"
FEATURES = 128

# The first object of a pair is the left or upper one, whichever the caption names first.
_AXES: tuple[Relation, ...] = ("left of", "above")

HEADS: dict[str, int] = {
    "pair": 2,
    "background": len(COLOURS),
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "position": len(POSITIONS) + 1,  # the last class is the middle
    "axis": len(_AXES),
    "first_shape": len(SHAPES),
    "first_colour": len(COLOURS),
    "second_shape": len(SHAPES),
    "second_colour": len(COLOURS),
}

MSG_IMAGES = "expected 64x64 RGB images, or a tensor [batch, 3, 64, 64] with values in [0, 1]; got {got}."


@dataclass(frozen=True)
class Reading:
    """A scene recognized in an image. Not validated like a `Scene`: object and background may have the same colour."""

    objects: tuple[SceneObject, ...]
    background: Colour
    position: Position | None
    relation: Relation | None


class AttributeReader(torch.nn.Module):
    """A classifier with four convolutions, 128 features and one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, FEATURES)
        layers: list[torch.nn.Module] = []
        for wide, wider in pairwise(widths):
            layers += [
                torch.nn.Conv2d(wide, wider, 3, stride=2, padding=1),
                torch.nn.GroupNorm(8, wider),
                torch.nn.SiLU(),
            ]
        self.body = torch.nn.Sequential(*layers)  # [batch, 128, 4, 4]
        self.neck = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * FEATURES, FEATURES), torch.nn.SiLU())
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(FEATURES, n) for name, n in HEADS.items()})

    @classmethod
    def load(cls) -> AttributeReader:
        """Return the reader with the weights of this package, on the CPU."""
        reader = cls()
        reader.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
        return reader.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the class scores of each head for pixels in [0, 1]."""
        hidden = self._embed(pixels)
        return {name: head(hidden) for name, head in self.heads.items()}

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.neck(self.body(2 * pixels - 1))
        return embedded

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Return the features that the heads classify, [batch, 128]."""
        return self._embed(_pixels(images))

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image] | torch.Tensor) -> list[Reading]:
        """Return one reading per image."""
        best = {name: scores.argmax(1).tolist() for name, scores in self(_pixels(images)).items()}
        return [_reading({name: numbers[i] for name, numbers in best.items()}) for i in range(len(best["pair"]))]

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image] | torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Return the fraction of images that show what their captions say, in total and by attribute.

        `all` is the fraction of images with every named attribute right. The other keys are attributes, counted over
        the captions that name them: `objects` (the number of objects), `shape`, `colour`, `background`, `size`,
        `position` and, for pairs, `relation`. In a pair, both objects must have the right shape and colour in the right
        place; `shape` and `colour` count each object.
        """
        if len(images) != len(captions):
            raise ValueError(f"expected one caption per image, got {len(images)} images and {len(captions)} captions.")
        best = {name: scores.argmax(1).tolist() for name, scores in self(_pixels(images)).items()}
        verdicts: dict[str, list[bool]] = {"all": []}
        for i, caption in enumerate(captions):
            seen = {name: numbers[i] for name, numbers in best.items()}
            verdict = _verdict(seen, parse_caption(caption))
            verdicts["all"].append(all(right for rights in verdict.values() for right in rights))
            for name, rights in verdict.items():
                verdicts.setdefault(name, []).extend(rights)
        return {name: sum(rights) / len(rights) for name, rights in verdicts.items() if rights}


def targets_of(scene: Scene) -> dict[str, int]:
    """Return the class index that each head should predict; heads that do not apply are omitted."""
    pair = len(scene.objects) == 2
    targets = {"pair": int(pair), "background": COLOURS.index(scene.background)}
    if pair:
        first, second = scene.objects
        if scene.relation in ("right of", "below"):
            first, second = second, first
        targets["axis"] = 0 if scene.relation in ("left of", "right of") else 1
        targets["first_shape"], targets["first_colour"] = (
            SHAPES.index(first.shape),
            COLOURS.index(first.colour),
        )
        targets["second_shape"], targets["second_colour"] = (
            SHAPES.index(second.shape),
            COLOURS.index(second.colour),
        )
        return targets
    (item,) = scene.objects
    targets["shape"], targets["colour"] = SHAPES.index(item.shape), COLOURS.index(item.colour)
    if item.size is not None:
        targets["size"] = SIZES.index(item.size)
    targets["position"] = len(POSITIONS) if scene.position is None else POSITIONS.index(scene.position)
    return targets


def _reading(seen: dict[str, int]) -> Reading:
    background = COLOURS[seen["background"]]
    if seen["pair"]:
        pair = tuple(
            SceneObject(SHAPES[seen[f"{place}_shape"]], COLOURS[seen[f"{place}_colour"]])
            for place in ("first", "second")
        )
        return Reading(pair, background, None, _AXES[seen["axis"]])
    item = SceneObject(SHAPES[seen["shape"]], COLOURS[seen["colour"]], SIZES[seen["size"]])
    position = None if seen["position"] == len(POSITIONS) else POSITIONS[seen["position"]]
    return Reading((item,), background, position, None)


def _verdict(seen: dict[str, int], scene: Scene) -> dict[str, list[bool]]:
    """Return whether each attribute of the scene was recognized, with one entry per object that has the attribute."""
    targets = targets_of(scene)
    right = {name: seen[name] == number for name, number in targets.items()}
    verdict = {"objects": [right["pair"]], "background": [right["background"]]}
    if not targets["pair"]:
        verdict |= {name: [right[name]] for name in ("shape", "colour", "size") if name in targets}
        if scene.position is not None:
            verdict["position"] = [right["position"]]
        return verdict
    parts = ("shape", "colour")
    for part in parts:
        verdict[part] = [right[f"first_{part}"], right[f"second_{part}"]]
    # If the objects are swapped, the axis is still right, but the relation is wrong.
    straight = sum(right[f"{place}_{part}"] for place in ("first", "second") for part in parts)
    exchanged = sum(
        seen[f"{place}_{part}"] == targets[f"{other}_{part}"]
        for place, other in (("first", "second"), ("second", "first"))
        for part in parts
    )
    verdict["relation"] = [right["axis"] and straight >= exchanged]
    return verdict


def _pixels(images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
    """Return pixels in [0, 1], [batch, 3, 64, 64]."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(MSG_IMAGES.format(got=f"a tensor {list(images.shape)}"))
        return images.float()
    for image in images:
        if image.size != (64, 64):
            raise ValueError(MSG_IMAGES.format(got=f"an image of {image.size[0]}x{image.size[1]}"))
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])  # [batch, 64, 64, 3]
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
