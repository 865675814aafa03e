"""A disk cache of captured and converted graphs, for later processes. Nothing here needs PyTorch.

It is a folder with one file per entry. Files are written under another name and then renamed, so that processes can
share the folder: a reader finds all of an entry or nothing. Each has a checksum; an entry that does not match is
removed, and computed again. Once the files exceed the limit, the least recently used are deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tgate_compile._errors import ConfigurationError

logger = logging.getLogger(__name__)

#: The variable that names another folder, or switches the cache off.
FOLDER_VARIABLE = "TGATE_COMPILE_CACHE"
#: The variable that sets the largest size.
SIZE_VARIABLE = "TGATE_COMPILE_CACHE_SIZE"
_OFF = frozenset({"0", "off", "no", "false"})
#: The largest size of the folder unless the variable sets another: thousands of graphs, which have no weights.
DEFAULT_SIZE = 2 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_MAGIC = b"tgate_compile cache 1\n"
_SUFFIX = ".entry"
#: Seconds after which an unfinished file is taken to be left over from a process that was killed.
_ABANDONED = 3600.0


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, as `tgate-compile cache` shows it.

    Attributes:
        kind: the kind of its contents: "graph", "onnx" or "verdict".
        label: a description, such as the denoiser's class.
        nbytes: the size of its file.
        used: when it was last read or written, in seconds since the epoch.
        path: its file.
    """

    kind: str
    label: str
    nbytes: int
    used: float
    path: Path


class DiskCache:
    """Entries in `folder`, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int = DEFAULT_SIZE) -> None:
        self.folder = folder
        self.limit = limit

    def read(self, key: str) -> bytes | None:
        """Return the contents of the entry `key`; None if there is none, or if its file is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        contents = _contents(data)
        if contents is None:
            self.remove(key, "its checksum does not match")
            return None
        with suppress(OSError):  # a read-only folder; the time only determines which entries are deleted first
            os.utime(path)
        return contents

    def write(self, key: str, contents: bytes, *, kind: str, label: str) -> None:
        """Write an entry, or log why that is not possible."""
        header = {"kind": kind, "label": label, "sha256": hashlib.sha256(contents).hexdigest()}
        path = self._path(key)
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
                temporary = Path(file.name)
                file.write(_MAGIC + json.dumps(header).encode() + b"\n" + contents)
            temporary.replace(path)
        except OSError as error:
            logger.info("the cache in %s cannot be written (%s)", self.folder, error)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            return
        self._make_room()

    def remove(self, key: str, reason: str) -> None:
        """Remove an entry that cannot be used."""
        logger.info("an entry of the cache in %s is not used: %s", self.folder, reason)
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        """Yield the entries whose files can be read, in no particular order."""
        for path in self._files(_SUFFIX):
            try:
                with path.open("rb") as file:
                    start = file.read(len(_MAGIC) + 4096)
                status = path.stat()
                header = json.loads(start.removeprefix(_MAGIC).partition(b"\n")[0])
                yield Entry(str(header["kind"]), str(header["label"]), status.st_size, status.st_mtime, path)
            except (OSError, ValueError, KeyError, TypeError):  # deleted meanwhile, or damaged
                continue

    def clear(self) -> int:
        """Delete all entries, and return how many there were."""
        count = 0
        for path in [*self._files(_SUFFIX), *self._files(".part")]:
            with suppress(OSError):
                path.unlink()
                count += path.suffix == _SUFFIX
        return count

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _files(self, suffix: str) -> Iterator[Path]:
        return self.folder.glob(f"[0-9a-f][0-9a-f]/*{suffix}")

    def _make_room(self) -> None:
        """Delete the least recently used entries until the rest is within the limit, and files left by others."""
        found = []
        for path in self._files(_SUFFIX):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken <= self.limit:
                break
            with suppress(OSError):
                path.unlink()
            taken -= size
        for path in self._files(".part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()


def _contents(data: bytes) -> bytes | None:
    """Return the contents of an entry's file; None if it is damaged."""
    header, found, contents = data.removeprefix(_MAGIC).partition(b"\n")
    if not data.startswith(_MAGIC) or not found:
        return None
    try:
        expected = json.loads(header)["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return contents if hashlib.sha256(contents).hexdigest() == expected else None


def disk_cache() -> DiskCache | None:
    """Return the cache that the environment's variables choose; None if they switch it off.

    Raises:
        ConfigurationError: `TGATE_COMPILE_CACHE_SIZE` is not a size.
    """
    chosen = os.environ.get(FOLDER_VARIABLE, "")
    if chosen.lower() in _OFF:
        return None
    try:
        folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tgate_compile")).expanduser()
    except RuntimeError:  # this user has no home
        return None
    return DiskCache(folder, _size(os.environ.get(SIZE_VARIABLE, "")))


def _size(text: str) -> int:
    if not text:
        return DEFAULT_SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", text.strip().upper())
    if match is None:
        raise ConfigurationError(f"{SIZE_VARIABLE} must be a size such as 500MB or 2GB, but is {text!r}.")
    return int(float(match[1]) * _UNITS[match[2] or ""])
