"""A bundle's manifest and files, read with suspicion. No torch and no ONNX is needed for it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from tgate_compile._bundle.files import file_of
from tgate_compile._bundle.manifest import (
    COMPONENTS_FOLDER,
    COMPONENTS_WEIGHTS_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    Manifest,
)
from tgate_compile._bundle.sizes import shape_at
from tgate_compile._bundle.wiring import check_wiring
from tgate_compile._errors import BundleError, ConfigurationError
from tgate_compile._schedule_file import read_schedule

#: A manifest has some kilobytes, and more with many graphs.
MAX_MANIFEST_BYTES = 50_000_000

MSG_NO_BUNDLE = "{folder} is no bundle: there is no {manifest} in it ({reason})."
MSG_TOO_LARGE = "{path} has more than {limit} bytes, and is no manifest."
MSG_INVALID = "The manifest {path} is not valid: {where}: {problem}."
MSG_NEWER = (
    "The manifest {path} has schema version {given}, and this tgate_compile reads versions up to {known}. "
    "Install a newer tgate_compile."
)
MSG_PATH = (
    "The manifest {path} names the file {given!r}. The files of a bundle are named relative to its folder, with "
    "forward slashes, and lie inside of it."
)
MSG_LINK = "{path} is a link, and a bundle has plain files and folders only. It has been changed since it was written."
MSG_MISSING = "The bundle {folder} is not complete: {files} of its manifest are not there."
MSG_EXTRA = "In the bundle {folder} are {files}, which its manifest does not name."
MSG_SIZE = "{path} has {given} bytes, and the manifest says {expected}. The copy is not complete, or was changed."
MSG_HASH = "{path} has been changed: its SHA-256 is not the one in the manifest."
MSG_UNLISTED = "The manifest {path} uses the file {given!r}, but does not name it among its files."
MSG_UNREADABLE = "{path} cannot be read: {reason}."


class _Header(BaseModel):
    """What a manifest of any version has."""

    model_config = ConfigDict(strict=True)
    schema_version: int = 0


def read_manifest(root: Path, *, hashes: bool = True) -> Manifest:
    """The manifest in `root`, after a look at all files that it names: their paths, sizes and hashes.

    Args:
        root: the bundle's folder.
        hashes: without, files may have been changed, though not in their sizes; which takes no time.

    Raises:
        BundleError: it is not what it must be; the message says in what.
    """
    try:
        manifest = _manifest(root)
        _check_files(root, manifest, hashes=hashes)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BundleError(MSG_UNREADABLE.format(path=root, reason=error)) from error
    return manifest


def _manifest(root: Path) -> Manifest:
    path = root / MANIFEST_FILE
    if path.is_symlink():
        raise BundleError(MSG_LINK.format(path=path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(MSG_NO_BUNDLE.format(folder=root, manifest=MANIFEST_FILE, reason=reason)) from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(MSG_TOO_LARGE.format(path=path, limit=MAX_MANIFEST_BYTES))
    try:
        version = _Header.model_validate_json(raw).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(MSG_NEWER.format(path=path, given=version, known=SCHEMA_VERSION))
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleError(_invalid(path, error)) from error
    try:
        read_schedule(manifest.method.schedule, f"The manifest {path}: method.schedule")
    except ConfigurationError as error:
        raise BundleError(str(error)) from error
    for used in (manifest.weights, *(graph.file for graph in manifest.graphs.values()), *_component_files(manifest)):
        # A Core ML package is a folder, whose files are named.
        is_folder = manifest.graph_format == "coreml" and any(name.startswith(f"{used}/") for name in manifest.files)
        if used is not None and used not in manifest.files and not is_folder:
            raise BundleError(MSG_UNLISTED.format(path=path, given=used))
    if manifest.weights not in (WEIGHTS_FILE, None) or (
        manifest.graph_format in ("onnx", "openvino") and manifest.weights is None
    ):
        raise BundleError(MSG_INVALID.format(path=path, where="weights", problem=f"expected {WEIGHTS_FILE!r}"))
    returns = manifest.denoiser.returns
    if returns.class_name and any(len(graph.outputs) != len(returns.fields) for graph in manifest.graphs.values()):
        raise BundleError(MSG_INVALID.format(path=path, where="denoiser.returns", problem="not one field an output"))
    quantized = [] if manifest.quantization is None else manifest.quantization.graphs
    if not set(quantized) <= set(manifest.graphs):
        raise BundleError(MSG_INVALID.format(path=path, where="quantization.graphs", problem=f"{quantized}"[:200]))
    _check_sizes(manifest, path)
    _check_components(manifest, path)
    check_wiring(manifest, path)
    return manifest


def _component_files(manifest: Manifest) -> list[str]:
    components = manifest.components
    if components is None:
        return []
    encoders = [file for encoder in components.text_encoders for file in (encoder.file, encoder.tokenizer.file)]
    return [components.weights, *encoders, components.vae_decoder.file]


def _check_components(manifest: Manifest, path: Path) -> None:
    """They have a weights file of their own, beside all their graphs, and say what each argument of the denoiser is."""
    components = manifest.components
    if components is None:
        return
    outside = [name for name in _component_files(manifest) if str(PurePosixPath(name).parent) != COMPONENTS_FOLDER]
    if outside or components.weights != COMPONENTS_WEIGHTS_FILE:
        raise BundleError(MSG_INVALID.format(path=path, where="components", problem="a file out of its folder"))
    if set(components.arguments) != set(manifest.denoiser.arguments):
        raise BundleError(MSG_INVALID.format(path=path, where="components.arguments", problem="not the denoiser's"))
    made = {"latents", "timestep", "sizes", "resolution", "aspect_ratio"}
    for encoder in components.text_encoders:
        inputs, outputs = ({spec.name for spec in specs} for specs in (encoder.inputs, encoder.outputs))
        if not (
            inputs <= {"input_ids", "attention_mask"} and {"hidden_states"} <= outputs <= {"hidden_states", "pooled"}
        ):
            raise BundleError(MSG_INVALID.format(path=path, where=encoder.component, problem=f"{inputs} to {outputs}"))
        made |= outputs | (inputs & {"attention_mask"})
    missing = set(components.arguments.values()) - made
    if missing:
        raise BundleError(
            MSG_INVALID.format(path=path, where="components.arguments", problem=f"nothing makes {sorted(missing)}")
        )


def _check_sizes(manifest: Manifest, path: Path) -> None:
    """Every free size in a shape is one of the manifest's."""
    example = {name: size.example for name, size in manifest.sizes.items()}
    for graph in manifest.graphs.values():
        for spec in (*graph.inputs, *graph.cache_inputs, *graph.outputs, *graph.cache_outputs):
            try:
                fits = all(size >= 0 for size in shape_at(spec.shape, example))
            except ValueError:
                fits = False
            if not fits:
                raise BundleError(MSG_INVALID.format(path=path, where=spec.name[:200], problem=f"shape {spec.shape}"))


def _invalid(path: Path, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200] or "the whole"
    return MSG_INVALID.format(path=path, where=where, problem=first["msg"])


def _check_files(root: Path, manifest: Manifest, *, hashes: bool) -> None:
    for name in manifest.files:
        _check_path(name, root / MANIFEST_FILE)
    found: set[str] = set()
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                raise BundleError(MSG_LINK.format(path=path))
        found.update(Path(parent, name).relative_to(root).as_posix() for name in files)
    named = {MANIFEST_FILE, *manifest.files}
    if named - found:
        raise BundleError(MSG_MISSING.format(folder=root, files=_listed(named - found)))
    if found - named:
        raise BundleError(MSG_EXTRA.format(folder=root, files=_listed(found - named)))
    for name, expected in manifest.files.items():
        path = root / name
        size = path.stat().st_size
        if size != expected.size:
            raise BundleError(MSG_SIZE.format(path=path, given=size, expected=expected.size))
    for name, expected in manifest.files.items() if hashes else ():
        if file_of(root / name) != expected:
            raise BundleError(MSG_HASH.format(path=root / name))


def _check_path(name: str, manifest: Path) -> None:
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not any(part in ("..", "/") or set(part) & set("\\:\0") for part in parts)
    if not plain or name == MANIFEST_FILE:
        raise BundleError(MSG_PATH.format(path=manifest, given=name))


def _listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
