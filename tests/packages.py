"""Skip tests that need a package which is not installed, without importing it."""

from __future__ import annotations

import importlib.util

import pytest


def need(*packages: str) -> None:
    """Skip the module that is being collected unless `packages` are installed.

    Unlike `pytest.importorskip`, this imports nothing: each process collects all files, but runs only half of them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)
