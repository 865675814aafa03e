"""A real server on a free port of this machine, for tests."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

#: Seconds after which something that should happen has not.
PATIENCE = 30.0


@contextmanager
def serving(app: FastAPI) -> Iterator[tuple[str, uvicorn.Server]]:
    """Run `app` under uvicorn in a thread, and return its address and the server."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


def eventually(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def picture(data: str) -> Image.Image:
    """Return the image in the base64 of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(data: str | Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the pixels of an image or of the base64 of one."""
    return np.asarray(picture(data) if isinstance(data, str) else data, dtype=np.int64)
