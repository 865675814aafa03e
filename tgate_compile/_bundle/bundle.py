"""A bundle that has been read and verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tgate_compile._bundle.manifest import Manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        folder: where it is.
        manifest: what it says of itself, which has been found to be so.
    """

    folder: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all its files but the manifest."""
        return sum(file.size for file in self.manifest.files.values())
