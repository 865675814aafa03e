"""The schedule strip as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.packages import need
from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.figures import _LOOKS, BY_LETTER, strip_picture

need("matplotlib")


def colours(path: Path) -> dict[tuple[int, ...], int]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, colour)): int(count) for colour, count in zip(found, counts, strict=True)}


def colour_of(letter: str) -> tuple[int, ...]:
    return ImageColor.getrgb(_LOOKS[BY_LETTER[letter].reuse][0])


def test_every_phase_of_the_strip_has_its_colour_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "strips.png"
    strip_picture({"v2": Schedule(6, sp_interval=5), "deep": Schedule(None, deepcache_interval=3)}, path, num_steps=9)
    found = colours(path)
    assert {letter for letter in "FSDPQR" if found.get(colour_of(letter), 0) > 500} == set("FSDP")


def test_a_guided_step_has_twice_the_height(tmp_path: Path) -> None:
    strip_picture({"a": "F" * 20}, tmp_path / "guided.png")
    strip_picture({"a": "f" * 20}, tmp_path / "unguided.png")
    guided, unguided = (colours(tmp_path / name)[colour_of("F")] for name in ("guided.png", "unguided.png"))
    assert 1.7 < guided / unguided < 2.3


def test_schedules_and_strips_are_drawn_alike_and_always_the_same(tmp_path: Path) -> None:
    schedule = Schedule(4)
    strip_picture({"a": schedule}, tmp_path / "a.png", num_steps=10)
    strip_picture({"a": schedule.strip(10)}, tmp_path / "b.png")
    strip_picture({"a": "FFFFpppppF"}, tmp_path / "c.png")
    first, same, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == same
    assert first != other


def test_all_letters_many_steps_and_all_formats(tmp_path: Path) -> None:
    rows = {"all": "".join(BY_LETTER), "a schedule of a hundred steps with a long label": Schedule(0.4), "short": "F"}
    for name in ("a.svg", "a.pdf", "a.PNG"):
        strip_picture(rows, tmp_path / name, num_steps=100)
        assert (tmp_path / name).stat().st_size > 1000
    assert (tmp_path / "a.svg").read_text().count("pruned, shallow") == 2


@pytest.mark.parametrize(
    ("rows", "name", "shown"),
    [
        ({}, "a.png", "needs a mapping"),
        ("FFpp", "a.png", "needs a mapping"),
        ({"mine": ""}, "a.png", "'mine'"),
        ({"mine": "FF1"}, "a.png", "'FF1'"),
        ({"mine": 10}, "a.png", "got 10"),
        ({"mine": "FFpp"}, "a.jpg", "a.jpg"),
        ({"mine": "FFpp"}, "none/a.png", "No such"),
    ],
)
def test_invalid_rows(rows: Any, name: str, shown: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=shown):
        strip_picture(rows, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"tgate_compile\[plots\]"):
        strip_picture({"a": "FFpp"}, tmp_path / "a.png")
