"""Draws a scene: 64x64 pixels, anti-aliased, from the distance of each pixel to the shape's outline."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tgate_compile._demo.captions import SIZES, Colour, Position, Relation, Scene, Shape, Size

IMAGE_SIZE = 64

RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 50),
    "green": (30, 155, 60),
    "blue": (35, 75, 215),
    "purple": (145, 50, 175),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}

_Field = npt.NDArray[np.float32]  # [64, 64]

_RADIUS: dict[Size | None, float] = {"large": 20.5, "small": 12.5}
_PAIR_RADIUS = 12.5
# How far from the middle an object stands: a large one has less room.
_SHIFT: dict[Size | None, float] = {"large": 9.0, "small": 14.0}
_PAIR_SHIFT = 15.5
_DIRECTION: dict[Position | Relation, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + np.float32(0.5)


def render(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The image of `scene`, uint8 [64, 64, 3].

    `rng` decides what the caption leaves open (an unnamed size) and varies place, radius and colour a
    little, never enough to change what the caption says.
    """
    image = np.broadcast_to(_shade(scene.background, rng), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for number, item in enumerate(scene.objects):
        centre = np.full(2, IMAGE_SIZE / 2) + rng.uniform(-2, 2, size=2)
        if scene.relation is not None:
            side = 1 if number == 0 else -1
            centre = centre + side * _PAIR_SHIFT * np.array(_DIRECTION[scene.relation])
            radius = _PAIR_RADIUS
        else:
            size = item.size if item.size is not None else SIZES[rng.integers(len(SIZES))]
            radius = _RADIUS[size]
            if scene.position is not None:
                centre = centre + _SHIFT[size] * np.array(_DIRECTION[scene.position])
        radius = radius * rng.uniform(0.95, 1.05)
        x = _COLUMNS - np.float32(centre[0])
        y = _ROWS - np.float32(centre[1])
        cover = np.clip(0.5 - _distance(item.shape, x, y, radius), 0, 1)[..., None]  # [64, 64, 1]
        image = image + cover * (_shade(item.colour, rng) - image)
    return np.asarray(image + 0.5).astype(np.uint8)


def _shade(colour: Colour, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.clip(np.array(RGB[colour]) + rng.uniform(-8, 8, size=3), 0, 255).astype(np.float32)


def _distance(shape: Shape, x: _Field, y: _Field, radius: float) -> _Field:
    """Distance in pixels from the outline, negative inside.

    The radius is that of a circle of about the same weight to the eye; pointed shapes reach further out.
    """
    if shape == "circle":
        return np.hypot(x, y) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.88 * radius)
    if shape == "triangle":
        # Equilateral, point up, its middle at two thirds of the height.
        y = y - np.float32(0.16 * radius)
        inner = np.float32(0.58 * radius)
        slope = np.abs(x) * np.float32(math.cos(math.pi / 6)) - y * np.float32(0.5)
        return np.maximum(slope, y) - inner
    return _star_distance(x, y, outer=1.2 * radius, inner=0.5 * radius)


def _star_distance(x: _Field, y: _Field, outer: float, inner: float) -> _Field:
    """Five points, one up. Every pixel is folded into one half of one point, bounded by one edge."""
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, -y)  # clockwise from straight up
    angle = np.abs(np.mod(angle + np.float32(sector / 2), np.float32(sector)) - np.float32(sector / 2))
    distance = np.hypot(x, y)
    across, along = distance * np.sin(angle), distance * np.cos(angle)
    # The edge runs from the tip (0, outer) to the notch.
    notch_across, notch_along = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    length = math.hypot(notch_across, outer - notch_along)
    normal = ((outer - notch_along) / length, notch_across / length)
    edge: _Field = across * np.float32(normal[0]) + (along - np.float32(outer)) * np.float32(normal[1])
    return edge
