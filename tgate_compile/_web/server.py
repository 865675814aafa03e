"""A server for this machine, with the headers that let a page have threads."""

from __future__ import annotations

import logging
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tgate_compile._errors import ConfigurationError

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
