"""The attribute reader, which judges the pipeline's images, is correct itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tgate_compile._demo.attribute_reader import FEATURES, AttributeReader, Reading
from tgate_compile._demo.captions import Scene, SceneObject, caption_of, parse_caption, random_scene, render


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader.load()


def _drawn(n: int, objects: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, objects, held_out=True) for _ in range(n)]
    return [Image.fromarray(render(scene, rng)) for scene in scenes], [caption_of(scene) for scene in scenes]


@pytest.mark.parametrize("objects", [1, 2])
def test_it_reads_drawn_images(reader: AttributeReader, objects: int) -> None:
    images, captions = _drawn(200, objects, seed=11)
    assert reader.score(images, captions)["all"] >= 0.97


def test_a_reading_names_everything(reader: AttributeReader) -> None:
    single = Scene((SceneObject("triangle", "yellow", "large"),), "blue", position="left")
    pair = Scene((SceneObject("circle", "red"), SceneObject("square", "black")), "white", relation="below")
    rng = np.random.default_rng(0)
    readings = reader.read([Image.fromarray(render(scene, rng)) for scene in (single, pair)])
    assert readings == [
        Reading(single.objects, "blue", "left", None),
        # The upper object comes first.
        Reading(pair.objects[::-1], "white", None, "above"),
    ]


def test_images_and_tensors_are_read_alike(reader: AttributeReader) -> None:
    images, captions = _drawn(8, 1, seed=3)
    array = np.stack([np.asarray(image) for image in images])
    pixels = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
    assert reader.read(images) == reader.read(pixels)
    assert reader.score(images, captions) == reader.score(pixels, captions)
    torch.testing.assert_close(reader.features(images), reader.features(pixels))
    assert reader.features(pixels).shape == (8, FEATURES)


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a large red circle at the top of a blue background", set()),
        ("a red circle on a blue background", set()),
        ("a large red square at the top of a blue background", {"shape"}),
        ("a large green circle at the top of a blue background", {"colour"}),
        ("a small red circle at the top of a blue background", {"size"}),
        ("a large red circle at the top of a white background", {"background"}),
        ("a large red circle at the left of a blue background", {"position"}),
    ],
)
def test_the_score_of_a_wrong_caption(reader: AttributeReader, caption: str, wrong: set[str]) -> None:
    scene = parse_caption("a large red circle at the top of a blue background")
    image = Image.fromarray(render(scene, np.random.default_rng(0)))
    score = reader.score([image], [caption])
    assert {name for name, share in score.items() if share < 1} == (wrong | {"all"} if wrong else set())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red circle left of a blue star on a black background", {}),
        ("a blue star right of a red circle on a black background", {}),
        ("a red circle right of a blue star on a black background", {"relation": 0, "shape": 0, "colour": 0}),
        ("a red circle above a blue star on a black background", {"relation": 0}),
        ("a red star left of a blue circle on a black background", {"shape": 0}),
        ("a red circle left of a green star on a black background", {"colour": 0.5}),
    ],
)
def test_the_score_of_a_pair(reader: AttributeReader, caption: str, expected: dict[str, float]) -> None:
    scene = parse_caption("a red circle left of a blue star on a black background")
    image = Image.fromarray(render(scene, np.random.default_rng(0)))
    score = reader.score([image], [caption])
    assert {name: share for name, share in score.items() if share < 1} == (expected | {"all": 0} if expected else {})


def test_one_object_is_no_pair(reader: AttributeReader) -> None:
    scene = parse_caption("a red circle on a blue background")
    image = Image.fromarray(render(scene, np.random.default_rng(0)))
    score = reader.score([image], ["a red circle left of a green star on a blue background"])
    assert score["objects"] == 0
    assert score["all"] == 0


def test_wrong_input_is_refused(reader: AttributeReader) -> None:
    with pytest.raises(ValueError, match="expected 64x64 RGB images"):
        reader.read([Image.new("RGB", (32, 64))])
    with pytest.raises(ValueError, match="expected 64x64 RGB images"):
        reader.features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="one caption per image"):
        reader.score(torch.zeros(2, 3, 64, 64), ["a red circle on a blue background"])
