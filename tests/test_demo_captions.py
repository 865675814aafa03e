"""Captions match their scenes, and the held-out split stays held out."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_compile._demo.captions import (
    COLOURS,
    SHAPES,
    SIZES,
    WORDINGS,
    Scene,
    SceneObject,
    caption_of,
    held_out_captions,
    is_held_out,
    parse_caption,
    random_scene,
)

RED_CIRCLE = SceneObject("circle", "red", "large")
PAIR = (SceneObject("circle", "orange"), SceneObject("star", "blue"))


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("wording", range(WORDINGS))
def test_a_caption_describes_everything_in_its_scene(objects: int, wording: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = random_scene(rng, objects)
        assert parse_caption(caption_of(scene, wording)) == scene


@pytest.mark.parametrize(
    ("scene", "captions"),
    [
        (
            Scene((RED_CIRCLE,), "blue"),
            [
                "a large red circle on a blue background",
                "large red circle, blue background",
                "a blue background with a large red circle",
            ],
        ),
        (
            Scene((RED_CIRCLE,), "white", position="top"),
            [
                "a large red circle at the top of a white background",
                "large red circle, top, white background",
                "a white background with a large red circle at the top",
            ],
        ),
        (
            Scene(PAIR, "green", relation="left of"),
            [
                "an orange circle left of a blue star on a green background",
                "orange circle left of blue star, green background",
                "a green background with an orange circle left of a blue star",
            ],
        ),
    ],
)
def test_the_wordings(scene: Scene, captions: list[str]) -> None:
    assert [caption_of(scene, wording) for wording in range(WORDINGS)] == captions


def test_what_the_caption_leaves_open_is_none() -> None:
    scene = parse_caption("A red circle on a white background.")
    assert scene == Scene((SceneObject("circle", "red"),), "white")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red dog on a white background",
        "a red circle",
        "a pink circle on a white background",
        "a red circle near a blue square on a white background",
        "a red circle left of a blue square at the top of a white background",
        "a small red circle left of a blue square on a white background",
        "a red circle on a red background",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match=r"expected|invisible|cannot have a position|cannot have a size"):
        parse_caption(caption)


def test_the_refusal_shows_the_grammar() -> None:
    with pytest.raises(ValueError, match=r"'a red dog'(.|\n)*a COLOUR background(.|\n)*triangle"):
        parse_caption("a red dog")


@pytest.mark.parametrize(
    ("objects", "position", "relation"),
    [(PAIR, None, None), ((RED_CIRCLE,), None, "above"), (PAIR, "top", "above"), ((), None, None)],
)
def test_impossible_scenes_are_refused(
    objects: tuple[SceneObject, ...], position: str | None, relation: str | None
) -> None:
    with pytest.raises(ValueError, match="object"):
        Scene(objects, "black", position, relation)  # type: ignore[arg-type]


@pytest.mark.parametrize("objects", [1, 2])
def test_training_never_sees_a_held_out_combination(objects: int) -> None:
    rng = np.random.default_rng(2)
    trained = [random_scene(rng, objects) for _ in range(500)]
    held_out = [parse_caption(caption) for caption in held_out_captions(100, seed=2, objects=objects)]
    assert not any(is_held_out(scene) for scene in trained)
    assert all(is_held_out(scene) for scene in held_out)

    def combinations(scenes: list[Scene]) -> set[tuple[frozenset[SceneObject], str]]:
        return {(frozenset(scene.objects), scene.background) for scene in scenes}

    assert not combinations(trained) & combinations(held_out)


def test_a_scene_of_open_size_is_held_out_with_either_size() -> None:
    for colour in COLOURS[:4]:
        for shape in SHAPES:
            sized = [Scene((SceneObject(shape, colour, size),), "black") for size in SIZES]
            open_size = Scene((SceneObject(shape, colour),), "black")
            assert is_held_out(open_size) == any(is_held_out(scene) for scene in sized)


def test_a_pair_is_held_out_whichever_object_comes_first() -> None:
    rng = np.random.default_rng(3)
    for held_out in (False, True):
        for _ in range(100):
            scene = random_scene(rng, 2, held_out=held_out)
            assert is_held_out(Scene(scene.objects[::-1], scene.background, relation="above")) == held_out


@pytest.mark.parametrize(
    ("caption", "held_out"),
    [
        ("a blue background with a large purple square at the right", True),
        ("a small white circle at the left of a purple background", True),
        ("an orange background with a large yellow square at the bottom", True),
        ("a large blue circle at the top of a yellow background", False),
        ("a large orange triangle at the left of a yellow background", False),
        ("a large green circle at the top of a yellow background", False),
        ("yellow square left of blue star, black background", True),
        ("a red square above a white circle on a blue background", True),
        ("white star above yellow triangle, orange background", True),
        ("a blue circle above a green star on a yellow background", False),
        ("a yellow square below a yellow star on a green background", False),
        ("a red square right of a purple square on a green background", False),
    ],
)
def test_the_split_is_the_same_everywhere(caption: str, held_out: bool) -> None:
    # The weights were trained on one side of the split, so it must never change.
    assert is_held_out(parse_caption(caption)) == held_out


def test_held_out_captions_differ_and_repeat() -> None:
    captions = held_out_captions(256, seed=7)
    assert len(set(captions)) == 256
    assert captions == held_out_captions(256, seed=7)
    assert captions != held_out_captions(256, seed=8)
