"""What is in the tree is in the wheel. `.ci/run` builds one and runs from it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import tgate_compile
from tgate_compile._demo.variants import DEMO_VARIANTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_listed(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    homes = {"tgate_compile": "tgate_compile", "passes": "tgate_compile.passes", "exports": "tgate_compile.exports"}
    found = set()
    for folder, package in homes.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if folder != "tgate_compile" or parts[:1] not in (("passes",), ("exports",)):
                found.add(".".join((package, *parts)))
    assert set(listed) == found


def test_the_embedded_weights_and_the_type_marker_are_package_data(project: dict[str, Any]) -> None:
    data = project["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in data["tgate_compile._demo"] for path in (ROOT / "tgate_compile/_demo").glob(pattern)}
    folders = {variant.folder for variant in DEMO_VARIANTS.values()}
    weights = {path for name in folders for path in (ROOT / "tgate_compile/_demo" / name).rglob("*") if path.is_file()}
    assert {path.relative_to(ROOT / "tgate_compile/_demo").parts[0] for path in weights} == folders
    assert weights <= shipped
    assert (ROOT / "tgate_compile" / data["tgate_compile"][0]).is_file()


def test_the_tested_set_meets_the_stated_ranges(project: dict[str, Any]) -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    extras = project["project"]["optional-dependencies"]
    stated = [*project["project"]["dependencies"], *extras["cli"], *extras["dev"]]
    for requirement in stated:
        name, _, least = requirement.partition(">=")
        if name.startswith("tgate_compile"):
            continue
        assert _version(pinned[name]) >= _version(least), requirement


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_the_version_has_a_line_in_the_changelog() -> None:
    assert tgate_compile.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_commands_of_the_readme_and_of_ci_are_the_same() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("-c constraints.txt -e '.[dev]'", "python -m pytest -n 2"):
        assert command in readme
        assert command in ci
