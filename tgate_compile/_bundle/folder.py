"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tgate_compile._bundle.manifest import MANIFEST_FILE
from tgate_compile._errors import BundleError

MSG_EXISTS = "{folder} exists already. Choose another folder, or give overwrite=True to replace the bundle in it."
MSG_NOT_A_BUNDLE = "{folder} exists and is no bundle, and is not replaced: it has no {manifest}."
MSG_NO_PARENT = "{folder} cannot be written: {parent} is no folder."
MSG_NOT_WRITTEN = "The bundle {folder} cannot be written: {reason}. Nothing is left of it."


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless a bundle can be put at `folder`, as far as can be told beforehand."""
    if not folder.parent.is_dir():
        raise BundleError(MSG_NO_PARENT.format(folder=folder, parent=folder.parent))
    if os.path.lexists(folder):
        if not overwrite:
            raise BundleError(MSG_EXISTS.format(folder=folder))
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if folder.is_symlink() or not (is_empty or (folder / MANIFEST_FILE).is_file()):
            raise BundleError(MSG_NOT_A_BUNDLE.format(folder=folder, manifest=MANIFEST_FILE))


@contextmanager
def written_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name at the end of the context; after an error it is gone.

    What was there goes only when its successor is complete. A process that is killed leaves at most a hidden folder,
    `.NAME.HEX.tmp`, or what was there as `.NAME.HEX.old`.

    Raises:
        BundleError: `folder` exists and is not to be replaced, or it cannot be written.
    """
    check_target(folder, overwrite=overwrite)
    mark = uuid.uuid4().hex
    temporary = folder.with_name(f".{folder.name}.{mark}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        check_target(folder, overwrite=overwrite)
        _move(temporary, folder, folder.with_name(f".{folder.name}.{mark}.old"))
    except OSError as error:
        raise BundleError(MSG_NOT_WRITTEN.format(folder=folder, reason=error.strerror or error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have everything on the disk before the name says that it is complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move(temporary: Path, folder: Path, old: Path) -> None:
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
