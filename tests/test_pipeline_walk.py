"""Every pipeline class of the installed diffusers is in exactly one list, and every listed class exists.

A failure after an upgrade of diffusers shows what is new: read the class, and add a row for it in `engine/families.py`.
"""

from __future__ import annotations

import diffusers
import pytest
from packaging.version import Version

from tests.denoisers_page import GUIDANCE_ONLY, lists_of, modular_classes, pipeline_classes, unavailable
from tgate_compile.engine.families import FAMILIES
from tgate_compile.engine.unsupported import (
    MODULAR,
    MODULAR_REFUSED,
    NOT_DENOISING,
    REFUSED,
    REFUSED_DENOISERS,
)

#: Names in rows that newer versions of diffusers no longer have.
FORMER = {"LuminaText2ImgPipeline"}

pytestmark = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="the rows are for diffusers 0.42 and later"
)


def test_the_walk_finds_what_diffusers_exports() -> None:
    exported = {
        name
        for name in set(dir(diffusers)) - unavailable()
        if isinstance(cls := getattr(diffusers, name, None), type)
        and issubclass(cls, (diffusers.DiffusionPipeline, diffusers.ModularPipeline))
    }
    bases = {"DiffusionPipeline", "ModularPipeline"}
    assert len(exported) > 300
    assert exported - bases <= pipeline_classes().keys() | modular_classes().keys()


def test_every_pipeline_is_in_one_list() -> None:
    found = {name: lists_of(cls) for name, cls in pipeline_classes().items()}
    assert {name: lists for name, lists in found.items() if len(lists) != 1} == {}


def test_every_modular_pipeline_is_in_one_list() -> None:
    assert not MODULAR.keys() & MODULAR_REFUSED.keys()
    assert modular_classes().keys() - unavailable() == (MODULAR.keys() | MODULAR_REFUSED.keys()) - unavailable()
    assert set(MODULAR.values()) <= FAMILIES.keys()
    assert set(MODULAR_REFUSED.values()) <= GUIDANCE_ONLY | REFUSED_DENOISERS.keys()


def test_every_row_has_a_class() -> None:
    rows = FAMILIES.keys() | REFUSED.keys() | NOT_DENOISING.keys()
    assert rows - pipeline_classes().keys() - unavailable() <= FORMER


def test_a_new_class_is_in_no_list() -> None:
    class NewPipeline(diffusers.DiffusionPipeline):
        pass

    assert lists_of(NewPipeline) == []
