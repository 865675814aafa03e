"""What holds for every test."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

# Tiny tensors: threads cost more than they bring, and a busy machine makes them cost far more.
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

HEAVY = "takes from twenty seconds to minutes; `pytest --heavy` runs it, as CI does"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="run the tests marked heavy, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--heavy"):
        return
    for item in items:
        if item.get_closest_marker("heavy") is not None:
            item.add_marker(pytest.mark.skip(reason=HEAVY))
