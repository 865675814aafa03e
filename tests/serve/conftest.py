"""Fixtures for tests of the engine."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest

from tests.serve.requesting import HANGS
from tgate_compile.engine import traffic


@pytest.fixture
def no_deadlock() -> Iterator[None]:
    """Print the stacks of all threads instead of hanging for ever, and check that no thread is left in a call."""
    faulthandler.dump_traceback_later(3 * HANGS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert traffic._owner is None
    assert not traffic._running
