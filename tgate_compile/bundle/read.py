"""Read a bundle with suspicion: whatever is not as the manifest says, or reaches out of the folder, is refused."""

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
    """A bundle on disk.

    Attributes:
        folder: where it is.
        manifest: what it says of itself, which has been found to be so.
    """

    folder: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all its files but the manifest."""
        return sum(file.size for file in self.manifest.files.values())


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
        raise BundleError(
            f"The bundle {root} has graphs of the format {manifest.graph_format!r}, and this tgate_compile reads "
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
