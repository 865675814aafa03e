"""Read a bundle with suspicion: whatever is not as the manifest says, or reaches out of the folder, is refused."""

from __future__ import annotations

import os
from pathlib import Path

from tgate_compile._bundle.bundle import Bundle
from tgate_compile._bundle.check_graph import check_graph
from tgate_compile._bundle.manifest import WEIGHTS_FILE
from tgate_compile._bundle.read_manifest import MSG_UNREADABLE, read_manifest
from tgate_compile._errors import BundleError


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """The bundle in `folder`, verified: its manifest, that its files are all there, their hashes, and its graphs.

    Nothing is unpickled, and nothing of it is run.

    Raises:
        BundleError: it is not what it must be; the message says in what.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    try:
        for graph in manifest.graphs.values():
            check_graph(graph, root, manifest.files[WEIGHTS_FILE].size)
    except (OSError, ValueError) as error:
        raise BundleError(MSG_UNREADABLE.format(path=root, reason=error)) from error
    return Bundle(root, manifest)
