"""Run graphs that AOTInductor has compiled."""

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

#: torch 2.11 takes all files for those of an entry that begin with its name: none may be the beginning of another.
ENTRY_SUFFIX = ".graph"

MSG_NO_PACKAGE = "{path} is no package of AOTInductor: {problem}."

#: Inside the folder that a package has for itself. Weights, programs and pickles would be elsewhere.
_CODE = re.compile(r"data/aotinductor/(?P<entry>[A-Za-z0-9_.-]+)/[A-Za-z0-9_][A-Za-z0-9_.-]*\.(?P<kind>[a-z0-9]+)")
_KINDS = frozenset({"so", "cpp", "json", "cubin", "hsaco", "fatbin", "spv"})
_NOTES = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})

#: What AOTInductor calls instruction sets, and whether this CPU has them.
_INSTRUCTIONS: Mapping[str, Callable[[], bool]] = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_VNNI": torch.cpu._is_vnni_supported,
    "AMX_TILE": torch.cpu._is_amx_tile_supported,
}


def entry_name(graph: str) -> str:
    """What the graph called `graph` is called in a package."""
    return graph + ENTRY_SUFFIX


def check_package(path: Path, entries: Collection[str]) -> None:
    """Check that the package at `path` has code for `entries` and nothing else.

    torch unpacks what is in it and loads the code: there must be one library for each entry (without one it would run
    a compiler with arguments from the package), no path out of its folder, and nothing that anyone unpickles.

    Raises:
        BundleError: it has not.
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
            problem = f"it has a file {member.filename[:200]!r} that has no place in one"
            raise BundleError(MSG_NO_PACKAGE.format(path=path, problem=problem))
        seen.add(name)
        if code is not None and code["kind"] == "so":
            libraries.append(code["entry"])
    if sorted(libraries) != sorted(entries):
        problem = f"it has the libraries {sorted(libraries)}, and the manifest says {sorted(entries)}"
        raise BundleError(MSG_NO_PACKAGE.format(path=path, problem=problem))


def check_runs_here(path: Path, entry: str, device: torch.device) -> None:
    """Raise BackendError unless the code of `entry` is for this machine and for `device`, as far as it says."""
    told = _metadata(path, entry)
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_DEVICE_KEY": device.type}
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        here["AOTI_COMPUTE_CAPABILITY"] = "".join(map(str, torch.cuda.get_device_capability(device)))
    wanted = {name: told.get(name) or value for name, value in here.items()}
    needed = told.get("AOTI_CPU_ISA", "").split()
    has = [name for name, is_there in _INSTRUCTIONS.items() if is_there()]
    if wanted != here or any(name in _INSTRUCTIONS and name not in has for name in needed):
        given, found = " ".join([*wanted.values(), *needed]), " ".join([*here.values(), *has])
        raise BackendError(
            f"{path} is native code for {given}, and this is {found}. Export the bundle on a machine like this one, "
            'or, among x86-64 CPUs, with format_options={"target": "x86-64-v3"}.'
        )


def _metadata(path: Path, entry: str) -> Mapping[str, str]:
    with zipfile.ZipFile(path) as archive:
        start = f"{path.stem}/data/aotinductor/{entry}/"
        names = [name for name in archive.namelist() if name.startswith(start) and name.endswith("_metadata.json")]
        told = json.loads(archive.read(names[0])) if names else {}
    return {str(name): str(value) for name, value in told.items()} if isinstance(told, dict) else {}


logger = logging.getLogger(__name__)


class AotiSession:
    """Runs an entry of a package for inputs on `device`; all entries of a bundle work on the same weights.

    torch unpacks the entry into a folder of its own in the system's temporary folder. It is removed with the session,
    or when Python exits; a process that is killed leaves it.

    Raises:
        BackendError: the code is for another machine, or cannot be loaded.
        BundleError: the bundle has not the weights that the code asks for.
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
            # Not torch's load_package, which opens all entries, and reads exported programs, which it unpickles.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self._path), graph.entry, False, 1, index)
            self._weights = mapped_weights(root, device)
            # The loader keeps their addresses only: self._weights keeps them alive.
            loader.load_constants(self._weights.tensors(loader.get_constant_fqns()), False, True, True)
        except TGateError:
            raise
        except (RuntimeError, OSError) as error:
            raise BackendError(self._failed("load", error)) from error
        held: list[Any] = [loader]
        self._held = held
        weakref.finalize(self, held.clear)  # at the latest when Python exits, which does not destroy what is left
        logger.info("opened %s of %s in %.1f s", graph.entry, self._path.name, time.perf_counter() - began)

    @property
    def provider(self) -> str:
        """For the manifest's parity."""
        return f"AOTInductor, {self._device.type}"

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last."""
        # Compiled code is made for fixed strides: contiguous ones.
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
