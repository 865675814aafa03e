"""Fetch ONNX Runtime for browsers with npm, check it against a pinned hash, and keep it in the user's cache."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tgate_compile._errors import ConfigurationError

logger = logging.getLogger(__name__)

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
#: The hash of the package's archive, in the notation of package-lock.json.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
#: The files for CPUs (WebAssembly) and for GPUs (WebGPU); a page loads only one of the two sets.
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)

_BY_HAND = f"get the package {PACKAGE} {VERSION} by other means, and pass its folder `dist` as --runtime"


def runtime_files(given: Path | None = None) -> dict[str, Path]:
    """Return the files that a site needs, by name, after fetching them if they are not in the cache.

    Args:
        given: a folder that contains them; the default is the cache.

    Raises:
        ConfigurationError: the files do not exist, or cannot be fetched.
    """
    if given is not None:
        missing = [name for name in FILES if not (given / name).is_file()]
        if missing:
            raise ConfigurationError(
                f"{given} has no {' and no '.join(missing)}. Pass the folder `dist` of {PACKAGE} {VERSION} as "
                "--runtime."
            )
        return {name: given / name for name in FILES}
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not all((folder / name).is_file() for name in FILES):
        _fetch(folder)
    return {name: folder / name for name in FILES}


def cache_folder() -> Path:
    """Return this package's folder in the platform's cache folder."""
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tgate_compile"


def _fetch(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigurationError(
            f"The page needs {PACKAGE}, which npm fetches, but there is no npm here. Install Node.js, which includes "
            f"it, or {_BY_HAND}."
        )
    logger.info("fetching %s %s with npm", PACKAGE, VERSION)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--pack-destination", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=name, check=False)
        archives = list(Path(name).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise ConfigurationError(
                f"npm could not fetch {PACKAGE} {VERSION}: {_reason(done.stderr)}. Check the network and the registry "
                f"that npm uses, or {_BY_HAND}."
            )
        given = _integrity(archives[0])
        if given != INTEGRITY:
            raise ConfigurationError(
                f"The file that npm fetched as {PACKAGE} {VERSION} is not the one that this tgate_compile expects: its "
                f"hash is {given}, not {INTEGRITY}. The file has been deleted."
            )
        unpacked = Path(name, "files")
        unpacked.mkdir()
        with tarfile.open(archives[0]) as archive:
            for file in FILES:
                member = archive.extractfile(f"package/dist/{file}")
                assert member is not None
                with member, (unpacked / file).open("wb") as out:
                    shutil.copyfileobj(member, out)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
        unpacked.rename(folder)


def _integrity(archive: Path) -> str:
    digest = hashlib.sha512(archive.read_bytes()).digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def _reason(output: str) -> str:
    """Return the first line of npm's output that is not a warning."""
    lines = [re.sub(r"^npm (error |ERR! )?", "", line).strip() for line in output.splitlines()]
    found = [line for line in lines if line and not line.startswith(("warn", "WARN", "code", "notice"))]
    return (found or ["no reason given"])[0].rstrip(".")
