"""The captions that the embedded models understand, and the images they describe."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Shape = Literal["circle", "square", "triangle", "star"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Size = Literal["small", "large"]
Position = Literal["left", "right", "top", "bottom"]
Relation = Literal["left of", "right of", "above", "below"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
POSITIONS: tuple[Position, ...] = get_args(Position)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

WORDINGS = 3
"""The number of wordings for the same scene; `caption_of` takes the index of one."""

MSG_CAPTION = (
    "cannot read the caption {caption!r}: expected one of\n"
    "  a [large|small] COLOUR SHAPE on a COLOUR background\n"
    "  a [large|small] COLOUR SHAPE at the left|right|top|bottom of a COLOUR background\n"
    "  a COLOUR SHAPE left of|right of|above|below a COLOUR SHAPE on a COLOUR background\n"
    "  (also 'red circle, top, blue background' and 'a blue background with a red circle at the top')\n"
    f"where COLOUR is one of {', '.join(COLOURS)} and SHAPE is one of {', '.join(SHAPES)}."
)

_HELD_OUT_SHARE = 8  # one in this many combinations is never used for training


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene; `size` is ``None`` if the caption does not name it, and always in pairs."""

    shape: Shape
    colour: Colour
    size: Size | None = None


@dataclass(frozen=True)
class Scene:
    """A scene with one object and an optional position, or with two objects and the relation of the first to the
    second."""

    objects: tuple[SceneObject, ...]
    background: Colour
    position: Position | None = None  # None: in the middle
    relation: Relation | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene must have one or two objects, got {len(self.objects)}.")
        if (len(self.objects) == 2) != (self.relation is not None):
            raise ValueError(
                f"two objects need a relation, and one object must not have one: got {len(self.objects)} and "
                f"relation={self.relation!r}."
            )
        if len(self.objects) == 2 and self.position is not None:
            raise ValueError("two objects cannot have a position; they have a relation.")
        for item in self.objects:
            if item.colour == self.background:
                raise ValueError(f"a {item.colour} {item.shape} is invisible on a background of the same colour.")
            if len(self.objects) == 2 and item.size is not None:
                raise ValueError("the objects of a pair cannot have a size: use size=None.")


def caption_of(scene: Scene, wording: int = 0) -> str:
    """Return the caption of `scene` in one of the `WORDINGS`."""
    background = f"{scene.background} background"
    if wording == 1:
        things = [_noun(item) for item in scene.objects]
        what = things[0] if scene.relation is None else f"{things[0]} {scene.relation} {things[1]}"
        where = "" if scene.position is None else f", {scene.position}"
        return f"{what}{where}, {background}"
    things = [_with_article(_noun(item)) for item in scene.objects]
    what = things[0] if scene.relation is None else f"{things[0]} {scene.relation} {things[1]}"
    background = _with_article(background)
    if wording == 0:
        where = "on" if scene.position is None else f"at the {scene.position} of"
        return f"{what} {where} {background}"
    if wording == 2:
        where = "" if scene.position is None else f" at the {scene.position}"
        return f"{background} with {what}{where}"
    raise ValueError(f"wording must be 0 to {WORDINGS - 1}, got {wording}.")


def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: the caption cannot be parsed; the message contains the grammar.
    """
    text = " ".join(caption.lower().replace(",", " , ").split()).rstrip(" .")
    for grammar in _GRAMMARS:
        match = grammar.fullmatch(text)
        if match is not None:
            break
    else:
        raise ValueError(MSG_CAPTION.format(caption=caption))
    part = match.groupdict()
    first = SceneObject(part["shape1"], part["colour1"], part["size1"])  # type: ignore[arg-type]
    objects: tuple[SceneObject, ...] = (first,)
    if part["relation"] is not None:
        objects = (first, SceneObject(part["shape2"], part["colour2"]))  # type: ignore[arg-type]
    return Scene(objects, part["background"], part["position"], part["relation"])  # type: ignore[arg-type]


def is_held_out(scene: Scene) -> bool:
    """Return whether the scene's combination of attributes is excluded from the training data.

    Position, relation and wording do not matter. A single object without a size is held out if it is held out in either
    size. For a pair, the order of the objects does not matter.
    """
    if len(scene.objects) == 2:
        return _is_held_out_key(sorted(f"{item.colour} {item.shape}" for item in scene.objects), scene.background)
    (item,) = scene.objects
    sizes = SIZES if item.size is None else (item.size,)
    return any(_is_held_out_key([f"{size} {item.colour} {item.shape}"], scene.background) for size in sizes)


def random_scene(rng: np.random.Generator, objects: int = 1, held_out: bool = False) -> Scene:
    """Return a random scene of the training split or the held-out split (where sizes are always named)."""
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects}.")
    while True:
        scene = _any_scene(rng, objects, may_omit_size=not held_out)
        if is_held_out(scene) == held_out:
            return scene


def held_out_captions(n: int, seed: int, objects: int = 1) -> list[str]:
    """Return `n` captions of held-out combinations, all different if there are enough."""
    rng = np.random.default_rng(seed)
    captions: list[str] = []
    seen: set[str] = set()
    attempts = 0
    while len(captions) < n:
        caption = caption_of(random_scene(rng, objects, held_out=True), int(rng.integers(WORDINGS)))
        attempts += 1
        if caption not in seen or attempts > 20 * n:
            seen.add(caption)
            captions.append(caption)
    return captions


def _noun(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}" if item.size is None else f"{item.size} {item.colour} {item.shape}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _is_held_out_key(things: list[str], background: str) -> bool:
    # A checksum rather than hash(), because the split must be the same in every process and Python version.
    return zlib.crc32(f"{'; '.join(things)} on {background}".encode()) % _HELD_OUT_SHARE == 0


def _any_scene(rng: np.random.Generator, objects: int, may_omit_size: bool) -> Scene:
    background, *colours = (COLOURS[i] for i in rng.permutation(len(COLOURS)))
    first_shape, second_shape = (SHAPES[i] for i in rng.integers(len(SHAPES), size=2))
    if objects == 2:
        # With two identical objects the relation would be meaningless.
        second_colour = colours[0] if first_shape != second_shape and rng.random() < 0.12 else colours[1]
        pair = (SceneObject(first_shape, colours[0]), SceneObject(second_shape, second_colour))
        return Scene(pair, background, relation=RELATIONS[rng.integers(len(RELATIONS))])
    size = None if may_omit_size and rng.random() < 0.15 else SIZES[rng.integers(len(SIZES))]
    position = None if rng.random() < 0.5 else POSITIONS[rng.integers(len(POSITIONS))]
    return Scene((SceneObject(first_shape, colours[0], size),), background, position=position)


def _grammars() -> tuple[re.Pattern[str], ...]:
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    position, relation = "|".join(POSITIONS), "|".join(RELATIONS)
    article = "(?:an? )?"
    single = f"(?:(?P<size1>{'|'.join(SIZES)}) )?(?P<colour1>{colour}) (?P<shape1>{shape})"
    other = f"(?: (?P<relation>{relation}) {article}(?P<colour2>{colour}) (?P<shape2>{shape}))?"
    what = f"{article}{single}{other}"
    background = f"{article}(?P<background>{colour}) background"
    return (
        re.compile(f"{what} (?:on|at the (?P<position>{position}) of) {background}"),
        re.compile(f"{what}(?: , (?P<position>{position}))? , {background}"),
        re.compile(f"{background} with {what}(?: at the (?P<position>{position}))?"),
    )


_GRAMMARS = _grammars()


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
# The distance of an object from the middle; large objects have less room.
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
    """Return an image of `scene`, uint8 [64, 64, 3].

    `rng` chooses an unnamed size, and varies place, radius and colour slightly, never so much that the caption would be
    wrong.
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
    """Return the distance from the outline in pixels, negative inside.

    `radius` is that of a circle that looks about as large; pointed shapes extend further.
    """
    if shape == "circle":
        return np.hypot(x, y) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.88 * radius)
    if shape == "triangle":
        # Equilateral, pointing up, with the centre at two thirds of the height.
        y = y - np.float32(0.16 * radius)
        inner = np.float32(0.58 * radius)
        slope = np.abs(x) * np.float32(math.cos(math.pi / 6)) - y * np.float32(0.5)
        return np.maximum(slope, y) - inner
    return _star_distance(x, y, outer=1.2 * radius, inner=0.5 * radius)


def _star_distance(x: _Field, y: _Field, outer: float, inner: float) -> _Field:
    """Return the distance from a five-pointed star that points up.

    By symmetry, every pixel is mapped to one half of one point, which is bounded by a single edge.
    """
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
