"""docs/denoisers.md says what the code's rows say, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers

from tests.denoiser_cases import CASES
from tgate_compile._families import FAMILIES, JOINT_ATTENTION, REFUSED, REFUSED_BASES, Family

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "denoisers.md").read_text(encoding="utf-8")


def table(first_column: str) -> list[list[str]]:
    """The rows of the page's table whose header begins with `first_column`."""
    lines = PAGE.split(f"| {first_column} |", 1)[1].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def supported() -> dict[str, list[str]]:
    """For each pipeline class, the other columns of its (last) row."""
    return {name: row[1:] for row in table("pipeline") for name in names(row[0])}


def test_every_row_of_the_code_and_every_tested_class_has_a_row() -> None:
    tested = {name.split(",")[0] for name in CASES}
    assert FAMILIES.keys() | tested <= supported().keys()


def test_guidance_arrives_as_the_code_has_it() -> None:
    for name, (_, _, arrives, goes_on, _) in supported().items():
        family = FAMILIES.get(name, Family())
        if arrives.startswith("two calls"):
            assert arrives == f"two calls, {' then '.join(family.calls)}", name
        elif arrives.startswith("one call"):
            assert f"[{'; '.join(family.order)}]" in arrives, name
            assert not family.calls, name
            assert ("alternating" in arrives) == bool(family.interleaved), name
            assert ("per frame" in arrives) == bool(family.repeated), name
        else:
            assert (arrives, goes_on) == ("as a number, no halves", "the one there is"), name
            continue
        assert goes_on == (family.only or "uncond or cond"), name


def test_tests_named_are_there() -> None:
    functions = set(re.findall(r"^def (test_\w+)", (TESTS / "test_pipelines.py").read_text(encoding="utf-8"), re.M))
    tested = {name.split(",")[0] for name in CASES}
    for name, row in supported().items():
        by = row[-1].strip("`")
        assert (by == "test_denoisers") == (name in tested), name
        assert by in functions | {"test_denoisers", "no"}, name


def test_classes_named_are_there() -> None:
    known = {*dir(diffusers), "LuminaText2ImgPipeline"}  # which newer versions of diffusers no longer have
    for name, row in supported().items():
        assert {name, *names(row[0])} <= known
    assert {name for row in table("denoiser with joint attention") for name in names(row[0])} <= known


def test_refused_pipelines_and_why() -> None:
    rows = table("pipeline, or base class of pipelines")
    given = {name: why for classes, why in rows for name in names(classes)}
    reasons = {**REFUSED, **REFUSED_BASES}
    assert given == {name: reason.split(". What works")[0] for name, reason in reasons.items()}


def test_denoisers_with_joint_attention() -> None:
    given = [name for row in table("denoiser with joint attention") for name in names(row[0])]
    assert sorted(given) == sorted(JOINT_ATTENTION)
