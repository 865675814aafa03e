"""Sizes and hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tgate_compile._bundle.manifest import File

_CHUNK = 1 << 20


def file_of(path: Path) -> File:
    """Size and hash of the file at `path`."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(size=size, sha256=digest.hexdigest())
