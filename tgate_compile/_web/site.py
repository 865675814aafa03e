"""The page for browsers: its folder with ONNX Runtime's files, and a server for it."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from tgate_compile._errors import BundleError, ConfigurationError
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.read_manifest import read_manifest

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
            f"The page needs {PACKAGE}, which npm downloads, but npm is not installed. Install Node.js, which includes "
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


HOST = "127.0.0.1"
#: The headers that isolate a page from other sites. Only isolated pages have shared memory, and therefore threads.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class _Handler(SimpleHTTPRequestHandler):
    # The system's types of these files are not reliable, and browsers are strict about the types of modules.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    isolated = True

    def end_headers(self) -> None:
        for name, value in HEADERS.items() if self.isolated else ():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")  # revalidate files, because a site may be written again
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Unisolated(_Handler):
    isolated = False


def server_for(folder: Path, port: int = 0, *, isolated: bool = True) -> ThreadingHTTPServer:
    """Return a local server for `folder`, which `serve_forever` starts.

    Args:
        folder: the folder to serve.
        port: the port; 0 means any free one.
        isolated: whether to send the headers that isolate a page, which static servers usually do not send.

    Raises:
        ConfigurationError: the port cannot be used.
    """
    handler = partial(_Handler if isolated else _Unisolated, directory=str(folder))
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"The site cannot be served at port {port}: {getattr(error, 'strerror', None) or error}. Choose another "
            "--port; 0 means any free one."
        ) from error


@contextmanager
def serving(folder: Path, *, isolated: bool = True) -> Iterator[str]:
    """Serve `folder` from a thread, and yield its address."""
    server = server_for(folder, isolated=isolated)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address_of(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def address_of(server: ThreadingHTTPServer) -> str:
    """Return the address of `server` for a browser."""
    return f"http://{HOST}:{server.server_address[1]}/"


#: The contents of a site's folder, besides the page.
BUNDLE_FOLDER = "bundle"
RUNTIME_FOLDER = "runtime"
SETTINGS_FILE = "site.json"
#: The schedulers that the page supports.
SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def is_site(folder: Path) -> bool:
    """Return whether `folder` contains a site."""
    return (folder / SETTINGS_FILE).is_file() and (folder / BUNDLE_FOLDER).is_dir()


def check_site_target(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigurationError unless a site can be written to `folder`, as far as this can be checked beforehand."""
    if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
        return
    if not is_site(folder) or folder.is_symlink():
        raise ConfigurationError(
            f"{folder} exists and is not replaced because it is not a site: it has no {SETTINGS_FILE}. Choose another "
            "--out."
        )
    if not overwrite:
        raise ConfigurationError(f"{folder} already exists. Choose another --out, or use --force to replace the site.")


def check_bundle(folder: Path) -> Manifest:
    """Return the manifest of the bundle in `folder`, after checking that the page can run the bundle.

    The page itself checks what only a browser can know.

    Raises:
        BundleError: the bundle is damaged, or the page does not support it.
    """
    manifest = read_manifest(folder)
    if manifest.graph_format != "onnx":
        raise BundleError(
            f'The bundle {folder} has graphs of the format {manifest.graph_format!r}, but browsers run only "onnx".'
        )
    if manifest.components is None:
        raise BundleError(
            f"The bundle {folder} has only the denoiser. The page needs a bundle that was exported with `tgate-compile "
            "export --components all`."
        )
    if manifest.scheduler.class_name not in SCHEDULERS:
        raise BundleError(
            f"The bundle {folder} has a {manifest.scheduler.class_name}, which the page does not support. Export a "
            f"bundle from a pipeline with one of these: {', '.join(SCHEDULERS)}."
        )
    return manifest


def write_site(
    folder: Path, bundle: Path, runtime: Mapping[str, Path], *, prompts: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Write a site to `folder`, completely or not at all.

    Args:
        folder: the folder of the site.
        bundle: the folder of a bundle with components, which is copied.
        runtime: the files of ONNX Runtime, by name.
        prompts: the prompts that the page suggests.
        overwrite: replace the site that is in `folder`.

    Raises:
        BundleError: the page does not support the bundle.
        ConfigurationError: the folder cannot be written.
    """
    check_site_target(folder, overwrite=overwrite)
    check_bundle(bundle)
    mark = uuid.uuid4().hex
    temporary, old = (folder.with_name(f".{folder.name}.{mark}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        for file in resources.files(__package__).joinpath("site").iterdir():
            (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / SETTINGS_FILE).write_text(
            json.dumps({"prompts": list(prompts)}, indent=1) + "\n", encoding="utf-8"
        )
        shutil.copytree(bundle, temporary / BUNDLE_FOLDER)
        (temporary / RUNTIME_FOLDER).mkdir()
        for name, path in runtime.items():
            shutil.copyfile(path, temporary / RUNTIME_FOLDER / name)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise ConfigurationError(
            f"The site {folder} cannot be written: {error.strerror or error}. Nothing has been written."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
