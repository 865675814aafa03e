"""ONNX Runtime for browsers: fetched by npm once, compared with a pinned hash, and kept in the user's cache."""

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
#: Of the package's archive, as package-lock.json files have it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
#: For processors by WebAssembly, and for GPUs by WebGPU; a page loads one of the two pairs.
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)

_BY_HAND = f"get the package {PACKAGE} {VERSION} by other means, and give its folder `dist` as --runtime"
MSG_NO_NPM = (
    f"The page runs on {PACKAGE}, which npm fetches, and there is no npm here. Install Node.js, which has it, or "
    f"{_BY_HAND}."
)
MSG_NPM_FAILED = (
    f"npm could not fetch {PACKAGE} {VERSION}: {{reason}}. See that the network is up, and npm's registry is right, or "
    f"{_BY_HAND}."
)
MSG_HASH = (
    f"What npm fetched as {PACKAGE} {VERSION} is another file than the one that this tgate_compile knows: its hash is "
    "{given}, and not {expected}. Nothing of it has been kept."
)
MSG_NOT_THERE = f"{{folder}} has no {{missing}}. Give the folder `dist` of {PACKAGE} {VERSION} as --runtime."


def runtime_files(given: Path | None = None) -> dict[str, Path]:
    """The files that a site needs, by name; fetched if they are not in the cache.

    Args:
        given: a folder that has them; None: the cache.

    Raises:
        ConfigurationError: they are not there, or cannot be fetched.
    """
    if given is not None:
        missing = [name for name in FILES if not (given / name).is_file()]
        if missing:
            raise ConfigurationError(MSG_NOT_THERE.format(folder=given, missing=" and no ".join(missing)))
        return {name: given / name for name in FILES}
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not all((folder / name).is_file() for name in FILES):
        _fetch(folder)
    return {name: folder / name for name in FILES}


def cache_folder() -> Path:
    """Where this package keeps what it has fetched: the platform's place for such things."""
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
        raise ConfigurationError(MSG_NO_NPM)
    logger.info("npm fetches %s %s", PACKAGE, VERSION)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--pack-destination", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=name, check=False)
        archives = list(Path(name).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise ConfigurationError(MSG_NPM_FAILED.format(reason=_reason(done.stderr)))
        given = _integrity(archives[0])
        if given != INTEGRITY:
            raise ConfigurationError(MSG_HASH.format(given=given, expected=INTEGRITY))
        unpacked = Path(name, "files")
        unpacked.mkdir()
        with tarfile.open(archives[0]) as archive:
            for file in FILES:
                member = archive.extractfile(f"package/dist/{file}")
                assert member is not None
                with member, (unpacked / file).open("wb") as out:
                    shutil.copyfileobj(member, out)
        shutil.rmtree(folder, ignore_errors=True)  # something is missing from it
        unpacked.rename(folder)


def _integrity(archive: Path) -> str:
    digest = hashlib.sha512(archive.read_bytes()).digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def _reason(told: str) -> str:
    """What npm says that is no warning."""
    lines = [re.sub(r"^npm (error |ERR! )?", "", line).strip() for line in told.splitlines()]
    found = [line for line in lines if line and not line.startswith(("warn", "WARN", "code", "notice"))]
    return (found or ["it does not say why"])[0].rstrip(".")
