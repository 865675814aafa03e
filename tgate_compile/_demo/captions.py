"""Scenes of one or two plain shapes, and the small language that describes them.

A caption and its scene say exactly the same: ``parse_caption(caption_of(scene)) == scene``. What the
scene leaves open (a size or a position that is ``None``) the caption does not mention.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

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
"""How many ways there are to say the same scene; `caption_of` takes the number of one."""

MSG_CAPTION = (
    "cannot read the caption {caption!r}: expected one of\n"
    "  a [large|small] COLOUR SHAPE on a COLOUR background\n"
    "  a [large|small] COLOUR SHAPE at the left|right|top|bottom of a COLOUR background\n"
    "  a COLOUR SHAPE left of|right of|above|below a COLOUR SHAPE on a COLOUR background\n"
    "  (also 'red circle, top, blue background' and 'a blue background with a red circle at the top')\n"
    f"with COLOUR one of {', '.join(COLOURS)} and SHAPE one of {', '.join(SHAPES)}."
)

_HELD_OUT_SHARE = 8  # one combination in so many is never trained on


@dataclass(frozen=True)
class SceneObject:
    """One shape; `size` is ``None`` where the caption does not name it, and always in pairs."""

    shape: Shape
    colour: Colour
    size: Size | None = None


@dataclass(frozen=True)
class Scene:
    """One object with an optional position, or two objects with the relation of the first to the second."""

    objects: tuple[SceneObject, ...]
    background: Colour
    position: Position | None = None  # None: in the middle
    relation: Relation | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, got {len(self.objects)}.")
        if (len(self.objects) == 2) != (self.relation is not None):
            raise ValueError(
                f"a relation belongs to two objects: got {len(self.objects)} and relation={self.relation!r}."
            )
        if len(self.objects) == 2 and self.position is not None:
            raise ValueError("only a single object has a position; two objects have a relation.")
        for item in self.objects:
            if item.colour == self.background:
                raise ValueError(f"a {item.colour} {item.shape} cannot be seen on the same background colour.")
            if len(self.objects) == 2 and item.size is not None:
                raise ValueError("objects of a pair have no size: give size=None.")


def caption_of(scene: Scene, wording: int = 0) -> str:
    """The caption of `scene`, in one of the `WORDINGS`."""
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
    """The scene a caption describes; a `ValueError` with the grammar where there is none."""
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
    """Whether the scene's combination of attributes is kept out of the training data.

    Position, relation and wording do not count. A single object of open size is held out when either
    of its sizes is; a pair has the same answer whichever object is named first.
    """
    if len(scene.objects) == 2:
        return _is_held_out_key(sorted(f"{item.colour} {item.shape}" for item in scene.objects), scene.background)
    (item,) = scene.objects
    sizes = SIZES if item.size is None else (item.size,)
    return any(_is_held_out_key([f"{size} {item.colour} {item.shape}"], scene.background) for size in sizes)


def random_scene(rng: np.random.Generator, objects: int = 1, held_out: bool = False) -> Scene:
    """A random scene from the training split, or from the held-out split (sizes always named there)."""
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects}.")
    while True:
        scene = _any_scene(rng, objects, may_omit_size=not held_out)
        if is_held_out(scene) == held_out:
            return scene


def held_out_captions(n: int, seed: int, objects: int = 1) -> list[str]:
    """`n` captions of combinations never trained on, all different as far as there are enough."""
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
    # A checksum, not hash(): the split must be the same in every process and Python version.
    return zlib.crc32(f"{'; '.join(things)} on {background}".encode()) % _HELD_OUT_SHARE == 0


def _any_scene(rng: np.random.Generator, objects: int, may_omit_size: bool) -> Scene:
    background, *colours = (COLOURS[i] for i in rng.permutation(len(COLOURS)))
    first_shape, second_shape = (SHAPES[i] for i in rng.integers(len(SHAPES), size=2))
    if objects == 2:
        # Two things that are exactly alike would leave the relation without a meaning.
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
