"""docs/reference/denoisers.md agrees with the rows in the code, and names tests that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.denoisers_page import (
    CACHED,
    IN_TEST_PIPELINES,
    MAP,
    PAGE,
    TESTED,
    denoiser_classes,
    denoisers_of,
    pipeline_classes,
    regenerated,
)
from tests.denoisers_page import unavailable as unavailable_classes
from tgate_compile.engine.families import FAMILIES

TESTS = Path(__file__).parent


def test_tables_are_up_to_date() -> None:
    if (unavailable_classes() - pipeline_classes().keys()) & FAMILIES.keys():
        pytest.skip("a package is missing that some of diffusers' pipelines need")
    page = PAGE.read_text(encoding="utf-8")
    assert page == regenerated(page), "regenerate the tables: python -m tests.denoisers_page"


def test_the_map_has_all_denoisers() -> None:
    found = json.loads(MAP.read_text(encoding="utf-8"))["denoisers"]
    missing = denoiser_classes() - found.keys()
    assert len(missing) <= 5, f"no tiny configuration: {sorted(missing)}; run python -m tests.denoiser_map"
    assert not found.keys() - denoiser_classes() - unavailable_classes()


def test_tests_of_test_pipelines_are_there() -> None:
    functions = set(re.findall(r"^def (test_\w+)", (TESTS / "test_pipelines.py").read_text(encoding="utf-8"), re.M))
    assert set(IN_TEST_PIPELINES.values()) <= functions


def test_only_gated_pipelines_are_tested() -> None:
    assert FAMILIES.keys() >= TESTED


def test_cached_values_are_listed_for_existing_denoisers() -> None:
    gated = FAMILIES.keys() & pipeline_classes().keys()
    assert CACHED.keys() <= {denoiser for name in gated for denoiser in denoisers_of(pipeline_classes()[name])}
