"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tests import once
from tests.sharing import shared_programs

# Tiny tensors: threads cost more than they bring, and a busy machine makes them cost far more.
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

HEAVY = "takes from twenty seconds to minutes; `pytest --heavy` runs it, as CI does"


#: The files that take longest come first: one of them at the end would keep one process busy, and the others waiting.
LONGEST = (
    "test_denoisers.py",
    "test_authors_reference.py",
    "test_executorch.py",
    "test_pipelines.py",
    "test_modular.py",
    "test_findings.py",
    "test_runtime.py",
    "test_components.py",
    "test_export.py",
    "test_openvino_bundle.py",
    "test_evaluate.py",
    "test_quantization.py",
    "test_bundle_state.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="run the tests marked heavy, too")


def pytest_configure(config: pytest.Config) -> None:
    once.begin(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    once.tell(node.config, node.workerinput)


def pytest_unconfigure(config: pytest.Config) -> None:
    once.end(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if config.getoption("--heavy"):
        return
    for item in items:
        if item.get_closest_marker("heavy") is not None:
            item.add_marker(pytest.mark.skip(reason=HEAVY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process as a whole, so that its fixtures are made once, unless --dist says otherwise."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="module")
def shared_captures() -> Iterator[None]:
    """Models that equal one of an earlier test take its traced graph; see `tests/sharing.py`."""
    with shared_programs():
        yield
