"""Convert scenes to class indices, which text encoders have to predict."""

from __future__ import annotations

import torch

from tgate_compile._demo.captions import COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene

# The last class of an attribute that may be missing means that it is missing.
TEXT_HEADS: dict[str, int] = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES) + 1,
    "background": len(COLOURS),
    "position": len(POSITIONS) + 1,
    "relation": len(RELATIONS) + 1,
    "second_shape": len(SHAPES) + 1,
    "second_colour": len(COLOURS) + 1,
}


def text_targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Return the class indices of each head, [batch]; the first object is the one that the caption names first."""
    rows: dict[str, list[int]] = {name: [] for name in TEXT_HEADS}
    for scene in scenes:
        first, second = scene.objects[0], scene.objects[1] if len(scene.objects) == 2 else None
        rows["shape"].append(SHAPES.index(first.shape))
        rows["colour"].append(COLOURS.index(first.colour))
        rows["size"].append(len(SIZES) if first.size is None else SIZES.index(first.size))
        rows["background"].append(COLOURS.index(scene.background))
        rows["position"].append(len(POSITIONS) if scene.position is None else POSITIONS.index(scene.position))
        rows["relation"].append(len(RELATIONS) if scene.relation is None else RELATIONS.index(scene.relation))
        rows["second_shape"].append(len(SHAPES) if second is None else SHAPES.index(second.shape))
        rows["second_colour"].append(len(COLOURS) if second is None else COLOURS.index(second.colour))
    return {name: torch.tensor(numbers) for name, numbers in rows.items()}


SLOT_HEADS: dict[str, int] = {"slot_shape": len(SHAPES), "slot_colour": len(COLOURS), "slot_place": 4}


def slot_targets(pairs: list[Scene]) -> dict[str, torch.Tensor]:
    """Return the class indices of both objects of each pair, [pairs, 2], the left or upper object first."""
    rows: dict[str, list[list[int]]] = {name: [] for name in SLOT_HEADS}
    for scene in pairs:
        first, second = scene.objects
        if scene.relation in ("right of", "below"):
            first, second = second, first
        rows["slot_shape"].append([SHAPES.index(first.shape), SHAPES.index(second.shape)])
        rows["slot_colour"].append([COLOURS.index(first.colour), COLOURS.index(second.colour)])
        # POSITIONS: left, right, top, bottom.
        rows["slot_place"].append([0, 1] if scene.relation in ("left of", "right of") else [2, 3])
    return {name: torch.tensor(numbers) for name, numbers in rows.items()}
