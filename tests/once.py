"""Make expensive files once in a test session, for all of its processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tgate_compile._cache import FOLDER_VARIABLE

_HOME = pytest.StashKey[Path]()
_folder: Path | None = None


def begin(config: pytest.Config) -> None:
    """Make the session's folder; the workers of pytest-xdist use the one that their controller has made."""
    global _folder
    given = getattr(config, "workerinput", {}).get("shared_folder")
    _folder = config.stash[_HOME] = Path(given or tempfile.mkdtemp(prefix="tgate-tests-"))
    # Equal models of other tests are then captured once, and a user's own cache is left alone.
    os.environ[FOLDER_VARIABLE] = str(_folder / "cache")


def tell(config: pytest.Config, worker: dict[str, str]) -> None:
    """Pass the folder's path to a worker."""
    worker["shared_folder"] = str(config.stash[_HOME])


def end(config: pytest.Config) -> None:
    """Remove the folder when all processes are done."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_HOME], ignore_errors=True)


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the path `name` written by `make`, in this process or another; do not modify it."""
    assert _folder is not None, "outside of pytest there is no session"
    path = _folder / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path
