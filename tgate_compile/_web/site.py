"""The page for browsers: its folder, and a server for it."""

from __future__ import annotations

import json
import logging
import os
import shutil
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

HOST = "127.0.0.1"
#: They isolate a page from all other sites; browsers give shared memory, and so threads, to isolated pages only.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class _Handler(SimpleHTTPRequestHandler):
    # What the machine says of these is not to be relied on, and browsers are strict with modules.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    isolated = True

    def end_headers(self) -> None:
        for name, value in HEADERS.items() if self.isolated else ():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")  # ask whether a file has changed: sites are written anew
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Unisolated(_Handler):
    isolated = False


def server_for(folder: Path, port: int = 0, *, isolated: bool = True) -> ThreadingHTTPServer:
    """A server of `folder` for this machine alone, at `port` or (0) any that is free; `serve_forever` starts it.

    Args:
        isolated: without, it sends no more than other static servers do.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    handler = partial(_Handler if isolated else _Unisolated, directory=str(folder))
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"The site cannot be served at port {port}: {getattr(error, 'strerror', None) or error}. Give "
            "another --port; 0 takes any that is free."
        ) from error


@contextmanager
def serving(folder: Path, *, isolated: bool = True) -> Iterator[str]:
    """Serve `folder` from a thread; gives the address of its pages."""
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
    """Where a browser finds it."""
    return f"http://{HOST}:{server.server_address[1]}/"


#: In a site's folder.
BUNDLE_FOLDER = "bundle"
RUNTIME_FOLDER = "runtime"
SETTINGS_FILE = "site.json"
#: What the page's schedulers are written for; `tgate_compile/runtime` has the same.
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def is_site(folder: Path) -> bool:
    """Whether there is a site in `folder`."""
    return (folder / SETTINGS_FILE).is_file() and (folder / BUNDLE_FOLDER).is_dir()


def check_site_target(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigurationError unless a site can be put at `folder`, as far as can be told beforehand."""
    if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
        return
    if not is_site(folder) or folder.is_symlink():
        raise ConfigurationError(
            f"{folder} exists and is no site, and is not replaced: it has no {SETTINGS_FILE}. Give another --out."
        )
    if not overwrite:
        raise ConfigurationError(f"{folder} exists already. Give another --out, or --force to write the site anew.")


def check_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle that a page can run. What only a browser can tell, the page tells.

    Raises:
        BundleError: it is damaged, or no page runs it.
    """
    manifest = read_manifest(folder)
    if manifest.graph_format != "onnx":
        raise BundleError(
            f'The bundle {folder} has graphs of the format {manifest.graph_format!r}, and browsers run "onnx".'
        )
    if manifest.components is None:
        raise BundleError(
            f"The bundle {folder} has the denoiser alone. A page needs one that was exported with `tgate-compile "
            "export --components all`."
        )
    if manifest.scheduler.class_name not in SCHEDULERS:
        raise BundleError(
            f"The bundle {folder} has a {manifest.scheduler.class_name}, which is not on the page. It has "
            f"{', '.join(SCHEDULERS)}: export a bundle from a pipeline with one of these."
        )
    return manifest


def write_site(
    folder: Path, bundle: Path, runtime: Mapping[str, Path], *, prompts: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Write a site to `folder`, as a whole or not at all.

    Args:
        folder: what is there is replaced if it is a site and `overwrite` is on.
        bundle: a complete bundle, which is copied.
        runtime: ONNX Runtime's files, by name.
        prompts: suggestions on the page.
        overwrite: see above.

    Raises:
        BundleError: no page runs the bundle.
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
            f"The site {folder} cannot be written: {error.strerror or error}. Nothing is left of it."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
