"""The page for browsers: its folder, and a server for it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
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

MSG_PORT = "The site cannot be served at port {port}: {reason}. Give another --port; 0 takes any that is free."


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
            MSG_PORT.format(port=port, reason=getattr(error, "strerror", None) or error)
        ) from error


def address_of(server: ThreadingHTTPServer) -> str:
    """Where a browser finds it."""
    return f"http://{HOST}:{server.server_address[1]}/"


#: In a site's folder.
BUNDLE_FOLDER = "bundle"
RUNTIME_FOLDER = "runtime"
SETTINGS_FILE = "site.json"
#: What the page's schedulers are written for; `tgate_compile/runtime` has the same.
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")

MSG_EXISTS = "{folder} exists already. Give another --out, or --force to write the site anew."
MSG_NOT_A_SITE = "{folder} exists and is no site, and is not replaced: it has no {marker}. Give another --out."
MSG_NOT_WRITTEN = "The site {folder} cannot be written: {reason}. Nothing is left of it."
MSG_NO_COMPONENTS = (
    "The bundle {folder} has the denoiser alone. A page needs one that was exported with `tgate-compile export "
    "--components all`."
)
MSG_FORMAT = 'The bundle {folder} has graphs of the format {given!r}, and browsers run "onnx".'
MSG_SCHEDULER = (
    "The bundle {folder} has a {given}, which is not on the page. It has {known}: export a bundle from a pipeline with "
    "one of these."
)


def is_site(folder: Path) -> bool:
    """Whether there is a site in `folder`."""
    return (folder / SETTINGS_FILE).is_file() and (folder / BUNDLE_FOLDER).is_dir()


def check_site_target(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigurationError unless a site can be put at `folder`, as far as can be told beforehand."""
    if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
        return
    if not is_site(folder) or folder.is_symlink():
        raise ConfigurationError(MSG_NOT_A_SITE.format(folder=folder, marker=SETTINGS_FILE))
    if not overwrite:
        raise ConfigurationError(MSG_EXISTS.format(folder=folder))


def check_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle that a page can run. What only a browser can tell, the page tells.

    Raises:
        BundleError: it is damaged, or no page runs it.
    """
    manifest = read_manifest(folder)
    if manifest.graph_format != "onnx":
        raise BundleError(MSG_FORMAT.format(folder=folder, given=manifest.graph_format))
    if manifest.components is None:
        raise BundleError(MSG_NO_COMPONENTS.format(folder=folder))
    if manifest.scheduler.class_name not in SCHEDULERS:
        raise BundleError(
            MSG_SCHEDULER.format(folder=folder, given=manifest.scheduler.class_name, known=", ".join(SCHEDULERS))
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
        raise ConfigurationError(MSG_NOT_WRITTEN.format(folder=folder, reason=error.strerror or error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
