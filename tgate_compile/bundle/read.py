"""Read and verify an untrusted bundle: reject whatever contradicts the manifest or refers to other folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tgate_compile._errors import BundleError, check_installed
from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.formats import check_can_load, components_functions, format_called
from tgate_compile.bundle.manifest import Manifest
from tgate_compile.bundle.read_manifest import MSG_UNREADABLE, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        folder: the folder that contains it.
        manifest: its manifest.
    """

    folder: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """The total size of all files except the manifest, in bytes."""
        return sum(file.size for file in self.manifest.files.values())


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Return the bundle in `folder`, after verifying its manifest, files, hashes and graphs.

    Nothing is unpickled, and no code of the bundle is run.

    Raises:
        BundleError: the bundle is not valid; the message says why.
        ConfigurationError: a package that its format needs is not installed.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if manifest.graph_format not in FORMATS:
        raise BundleError(
            f"The bundle {root} has graphs of the format {manifest.graph_format!r}, but this tgate_compile reads only "
            f"{', '.join(FORMATS)}."
        )
    check_can_load(manifest.graph_format)
    functions = format_called(manifest.graph_format)
    try:
        for graph in manifest.graphs.values():
            functions.check_graph(graph, root, manifest)
        _check_components(root, manifest)
    except (OSError, ValueError) as error:
        raise BundleError(MSG_UNREADABLE.format(path=root, reason=error)) from error
    return Bundle(root, manifest)


def _check_components(root: Path, manifest: Manifest) -> None:
    if manifest.components is None:
        return
    check_installed("onnx", what="A bundle with components")
    functions = components_functions()
    size = manifest.files[manifest.components.weights].size
    decoder = manifest.components.vae_decoder
    for encoder in manifest.components.text_encoders:
        functions.check_component(root / encoder.file, encoder.inputs, encoder.outputs, size)
    functions.check_component(root / decoder.file, decoder.inputs, decoder.outputs, size)
