"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tests import once

# On tiny tensors threads cost more than they gain, and far more on a busy machine.
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

HEAVY = "takes from twenty seconds to minutes; `pytest --heavy` runs it, as CI does"


#: Slowest files, run first: one of them at the end would keep one process busy while the others wait.
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


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking the imported packages, which takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # plugins that are imported last look for referrers of their objects


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
    """Run each file in a single process, so that its fixtures are made once, unless --dist is given."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # would sort by the number of tests
    return LoadFileScheduling(config, log)
