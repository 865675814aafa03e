"""Read a bundle with suspicion: whatever is not as the manifest says, or reaches out of the folder, is refused."""

from __future__ import annotations

import os
from pathlib import Path

from tgate_compile._bundle.bundle import Bundle
from tgate_compile._bundle.formats import FORMATS, check_can_load, format_called
from tgate_compile._bundle.read_manifest import MSG_UNREADABLE, read_manifest
from tgate_compile._errors import BundleError

MSG_FORMAT = "The bundle {folder} has graphs of the format {given!r}, and this tgate_compile reads {known}."


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """The bundle in `folder`, verified: its manifest, that its files are all there, their hashes, and its graphs.

    Nothing is unpickled, and nothing of it is run.

    Raises:
        BundleError: it is not what it must be; the message says in what.
        ConfigurationError: a package that its format needs is missing.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if manifest.graph_format not in FORMATS:
        raise BundleError(MSG_FORMAT.format(folder=root, given=manifest.graph_format, known=", ".join(FORMATS)))
    check_can_load(manifest.graph_format)
    functions = format_called(manifest.graph_format)
    try:
        for graph in manifest.graphs.values():
            functions.check_graph(graph, root, manifest)
    except (OSError, ValueError) as error:
        raise BundleError(MSG_UNREADABLE.format(path=root, reason=error)) from error
    return Bundle(root, manifest)
