"""Rendered images match their scenes."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_compile._demo.captions import COLOURS, IMAGE_SIZE, RGB, SHAPES, Scene, SceneObject, random_scene, render


def _covered(scene: Scene, seed: int = 0) -> np.ndarray:
    """Return the mask of pixels with the first object's colour, [64, 64]."""
    image = render(scene, np.random.default_rng(seed)).astype(float)
    return np.abs(image - RGB[scene.objects[0].colour]).max(axis=2) < 40


def test_an_image_is_64x64_rgb() -> None:
    rng = np.random.default_rng(0)
    for objects in (1, 2):
        image = render(random_scene(rng, objects), rng)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert image.dtype == np.uint8


def test_the_same_generator_gives_the_same_image() -> None:
    scene = Scene((SceneObject("star", "red"),), "white")
    first, second, other = (render(scene, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_large_and_small_cannot_be_confused(shape: str) -> None:
    small, large = (
        [_covered(Scene((SceneObject(shape, "red", size),), "white"), seed).sum() for seed in range(20)]  # type: ignore[arg-type]
        for size in ("small", "large")
    )
    assert min(large) > 2 * max(small)


@pytest.mark.parametrize("colour", COLOURS)
def test_object_and_background_have_their_colours(colour: str) -> None:
    background = "black" if colour != "black" else "white"
    scene = Scene((SceneObject("square", colour, "large"),), background)  # type: ignore[arg-type]
    image = render(scene, np.random.default_rng(1)).astype(int)
    assert np.abs(image[32, 32] - RGB[colour]).max() <= 9  # type: ignore[index]
    assert np.abs(image[1, 1] - RGB[background]).max() <= 9  # type: ignore[index]


@pytest.mark.parametrize(
    ("position", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("top", 0, -1), ("bottom", 0, 1)]
)
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_position_moves_the_object_that_way(position: str, axis: int, sign: int, size: str) -> None:
    scene = Scene((SceneObject("circle", "red", size),), "white", position=position)  # type: ignore[arg-type]
    for seed in range(5):
        offset = np.argwhere(_covered(scene, seed)).mean(axis=0) - 31.5
        assert sign * offset[axis] > 5
        assert abs(offset[1 - axis]) < 4


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)]
)
def test_a_relation_places_the_first_object(relation: str, axis: int, sign: int) -> None:
    pair = (SceneObject("circle", "red"), SceneObject("square", "blue"))
    scene = Scene(pair, "white", relation=relation)  # type: ignore[arg-type]
    offset = np.argwhere(_covered(scene)).mean(axis=0) - 31.5
    assert sign * offset[axis] > 10


def test_outlines_are_smooth() -> None:
    scene = Scene((SceneObject("circle", "black", "large"),), "white")
    grey = render(scene, np.random.default_rng(0))[..., 0]
    between = ((grey > 40) & (grey < 215)).sum()
    assert 40 < between < 300
