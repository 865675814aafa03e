"""Check and run graphs that AOTInductor has compiled."""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_compile._errors import BackendError, BundleError, TGateError, first_line
from tgate_compile.bundle.manifest import Graph
from tgate_compile.bundle.weights import mapped_weights

#: The suffix of entry names. torch 2.11 assigns all files to an entry that start with its name, so no name may be a
#: prefix of another.
ENTRY_SUFFIX = ".graph"

MSG_NO_PACKAGE = "{path} is not a valid AOTInductor package: {problem}."

#: The paths of code in a package. Weights, programs and pickles would be in other folders.
_CODE = re.compile(r"data/aotinductor/(?P<entry>[A-Za-z0-9_.-]+)/[A-Za-z0-9_][A-Za-z0-9_.-]*\.(?P<kind>[a-z0-9]+)")
_KINDS = frozenset({"so", "cpp", "json", "cubin", "hsaco", "fatbin", "spv"})
_NOTES = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})

#: AOTInductor's names of instruction sets, with functions that return whether this CPU supports them.
_INSTRUCTIONS: Mapping[str, Callable[[], bool]] = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_VNNI": torch.cpu._is_vnni_supported,
    "AMX_TILE": torch.cpu._is_amx_tile_supported,
}


def entry_name(graph: str) -> str:
    """Return the name of the entry for `graph` in a package."""
    return graph + ENTRY_SUFFIX


def check_package(path: Path, entries: Collection[str]) -> None:
    """Check that the package at `path` contains the code of `entries` and nothing else.

    torch unpacks the package and loads the code. There must be one library for each entry (without one, torch would run
    a compiler with arguments from the package), no path that leads out of the folder, and nothing that is unpickled.

    Raises:
        BundleError: the package is not valid.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BundleError(MSG_NO_PACKAGE.format(path=path, problem=error)) from error
    libraries: list[str] = []
    seen: set[str] = set()
    for member in members:
        root, _, name = member.filename.partition("/")
        code = _CODE.fullmatch(name)
        known = name in _NOTES or (code is not None and code["kind"] in _KINDS and "_flags." not in name)
        stored = member.compress_type == zipfile.ZIP_STORED and member.filename == member.orig_filename
        if root != path.stem or not known or not stored or name in seen:
            problem = f"it contains an unexpected file {member.filename[:200]!r}"
            raise BundleError(MSG_NO_PACKAGE.format(path=path, problem=problem))
        seen.add(name)
        if code is not None and code["kind"] == "so":
            libraries.append(code["entry"])
    if sorted(libraries) != sorted(entries):
        problem = f"it has the libraries {sorted(libraries)}, but the manifest says {sorted(entries)}"
        raise BundleError(MSG_NO_PACKAGE.format(path=path, problem=problem))


def check_runs_here(path: Path, entry: str, device: torch.device) -> None:
    """Raise BackendError if the metadata of `entry` says that its code is for another machine or device."""
    metadata = _metadata(path, entry)
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_DEVICE_KEY": device.type}
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        here["AOTI_COMPUTE_CAPABILITY"] = "".join(map(str, torch.cuda.get_device_capability(device)))
    required = {name: metadata.get(name) or value for name, value in here.items()}
    needed = metadata.get("AOTI_CPU_ISA", "").split()
    has = [name for name, is_supported in _INSTRUCTIONS.items() if is_supported()]
    if required != here or any(name in _INSTRUCTIONS and name not in has for name in needed):
        given, found = " ".join([*required.values(), *needed]), " ".join([*here.values(), *has])
        raise BackendError(
            f"{path} is native code for {given}, but this machine is {found}. Export the bundle on a machine like this "
            'one or, for any x86-64 CPU with AVX2, with format_options={"target": "x86-64-v3"}.'
        )


def _metadata(path: Path, entry: str) -> Mapping[str, str]:
    with zipfile.ZipFile(path) as archive:
        start = f"{path.stem}/data/aotinductor/{entry}/"
        names = [name for name in archive.namelist() if name.startswith(start) and name.endswith("_metadata.json")]
        content = json.loads(archive.read(names[0])) if names else {}
    return {str(name): str(value) for name, value in content.items()} if isinstance(content, dict) else {}


logger = logging.getLogger(__name__)


class AotiSession:
    """A session that runs an entry of a package for inputs on `device`; all entries of a bundle share its weights.

    torch unpacks the entry into a new folder in the system's temporary folder. This is removed with the session, or
    when Python exits; a process that is killed leaves it behind.

    Raises:
        BackendError: the code is for another machine, or cannot be loaded.
        BundleError: the bundle does not have the weights that the code needs.
    """

    def __init__(self, graph: Graph, root: Path, device: torch.device) -> None:
        began = time.perf_counter()
        assert graph.entry is not None
        self._path = root / graph.file
        self._entry = graph.entry
        self._device = device
        index = -1 if device.index is None else device.index
        try:
            check_runs_here(self._path, graph.entry, device)
            # Not torch's load_package, which opens all entries, and unpickles exported programs.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self._path), graph.entry, False, 1, index)
            self._weights = mapped_weights(root, device)
            # The loader stores only their addresses; self._weights keeps them alive.
            loader.load_constants(self._weights.tensors(loader.get_constant_fqns()), False, True, True)
        except TGateError:
            raise
        except (RuntimeError, OSError) as error:
            raise BackendError(self._failed("load", error)) from error
        held: list[Any] = [loader]
        self._held = held
        weakref.finalize(self, held.clear)  # also when Python exits, which does not destroy remaining objects
        logger.info("opened %s of %s in %.1f s", graph.entry, self._path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """The name of the runtime and of its device."""
        return f"AOTInductor, {self._device.type}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last."""
        # Compiled code expects fixed strides: contiguous ones.
        try:
            outputs: list[torch.Tensor] = self._held[0].boxed_run([tensor.contiguous() for tensor in inputs])
        except RuntimeError as error:
            raise BackendError(self._failed("run", error)) from error
        return outputs

    def _failed(self, what: str, error: Exception) -> str:
        problem = first_line(error, named=True)
        return (
            f"AOTInductor could not {what} {self._entry} of {self._path} ({problem}). This is torch "
            f"{torch.__version__}."
        )
