"""Keep captured graphs, converted graphs and their comparisons with PyTorch on disk, for later processes.

A capture is found again by a hash of everything that it depends on: the denoiser's fingerprint, the call, the
configuration, the versions of the packages and the settings of torch. Where there is no such hash (code from
outside the known libraries, free sizes), nothing is kept, and the graph is captured anew in each process. What is made
of a graph is found by a hash of the graph itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from tgate_compile._cache import disk_cache
from tgate_compile._machine import cpu_model
from tgate_compile.engine.purity import has_foreign_code
from tgate_compile.engine.read_code import TRUSTED
from tgate_compile.engine.weights import Identity, live_tensors
from tgate_compile.passes.graphs import Captured, Origins, Site, Variant, flat_program
from tgate_compile.passes.stored_graphs import (
    NotReadableError,
    NotStorableError,
    constants_of,
    contents_of,
    digest_of,
    from_json,
    to_json,
)

logger = logging.getLogger(__name__)

#: Part of every key: changed together with what the entries hold.
_FORMAT = "3"
#: The most bytes of constants that a graph may have on disk. Tables of positions take a few megabytes.
_MOST_CONSTANTS = 64 * 2**20
#: Packages that every graph depends on.
_ALWAYS = ("diffusers", "tgate_compile")
#: The prefix of the environment variables that the models' code reads.
_VARIABLES = "DIFFUSERS_"


class NotStableError(Exception):
    """A value has no description that would be the same in another process."""


def kept_capture(denoiser: torch.nn.Module, dependencies: Hashable, make: Callable[[], Captured]) -> Captured:
    """Return the capture of `denoiser` that `make` makes, from disk if an earlier process has made it.

    Args:
        denoiser: the module, whose present tensors become those of the capture.
        dependencies: all that the capture depends on besides the packages: the denoiser's fingerprint, the call's key.
        make: captures the denoiser.
    """
    cache, model = disk_cache(), type(denoiser).__name__
    key = None if cache is None else _key_of_capture(denoiser, dependencies)
    if cache is None or key is None:
        return make()
    began = time.perf_counter()
    found = cache.read(key)
    if found is not None:
        try:
            captured = _read_capture(zlib.decompress(found), live_tensors(denoiser))
        except (NotReadableError, zlib.error) as error:
            cache.remove(key, f"it is not the graph of this {model} ({error})")
        else:
            logger.info(
                "%s was captured by an earlier process: %d nodes, %d sites, read from disk in %.1f s",
                model, len(captured.program.graph.nodes), len(captured.sites), time.perf_counter() - began,
            )  # fmt: skip
            return captured
    captured = make()
    try:
        cache.write(key, zlib.compress(_written_capture(captured), 1), kind="graph", label=model)
    except NotStorableError as error:
        logger.debug("a graph of %s is not kept on disk: %s", model, error)
    return captured


def _key_of_capture(denoiser: torch.nn.Module, dependencies: Hashable) -> str | None:
    """Return the key of a capture of `denoiser`; None if it cannot be kept on disk."""
    if has_foreign_code(denoiser):
        return None
    try:
        description = _Description()
        description.add((_FORMAT, _settings_of_torch(), dependencies))
        return description.digest()
    except NotStableError as error:
        logger.debug("graphs of %s are not kept on disk: %s", type(denoiser).__name__, error)
        return None


def kept(variant: Variant, kind: str, settings: Hashable, make: Callable[[], bytes]) -> bytes:
    """Return the bytes that `make` makes of `variant` with these settings, from disk if an earlier process made them.

    Args:
        variant: the graph. The result must not depend on its weights.
        kind: the kind of result, for example "onnx".
        settings: other values that the result depends on, for example versions of packages.
        make: makes the result.
    """
    cache = disk_cache()
    key = None if cache is None else _key_of_graph(variant, kind, settings)
    if cache is None or key is None:
        return make()
    found = cache.read(key)
    if found is None:
        found = make()
        cache.write(key, found, kind=kind, label=f"the {variant.phase.name} graph")
    return found


@dataclass(frozen=True)
class Verdict:
    """The place on disk for the fact that a backend's results for a graph and its weights agree with PyTorch's."""

    key: str
    label: str

    @property
    def is_known(self) -> bool:
        """Whether an earlier process has found so."""
        cache = disk_cache()
        return cache is not None and cache.read(self.key) is not None

    def keep(self) -> None:
        """Note that this process has found so."""
        cache = disk_cache()
        if cache is not None:
            cache.write(self.key, b"", kind="verdict", label=self.label)


def verdict_on(
    variant: Variant, backend: Hashable, weights: Sequence[int], inputs: Sequence[torch.Tensor]
) -> Verdict | None:
    """Return the verdict on a backend's results for `variant`; None if it cannot be kept.

    Args:
        variant: the graph.
        backend: the properties that the results depend on: the backend's name, its options, and its packages' versions.
        weights: the sums of the weights' bits (`samples.sums_of_bits`).
        inputs: inputs like those that are compared; only their device matters.
    """
    if disk_cache() is None:
        return None
    device = inputs[0].device
    machine = cpu_model() if device.type == "cpu" else _name_of(device)
    key = _key_of_graph(variant, "verdict", (backend, tuple(weights), machine))
    return None if key is None else Verdict(key, f"the {variant.phase.name} graph agrees with PyTorch")


def versions_of(*packages: str) -> tuple[str, ...]:
    """Return the versions of installed packages."""
    return tuple(map(_version_of, packages))


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a module of a package with another name, such as onnxruntime-gpu
        return str(getattr(sys.modules.get(package), "__version__", ""))


def _name_of(device: torch.device) -> str:
    module = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return f"{device.type} {name(device) if callable(name) else ''}"


def _key_of_graph(variant: Variant, kind: str, settings: Hashable) -> str | None:
    try:
        description = _Description()
        description.add((_FORMAT, _settings_of_torch(), digest_of(variant.program), kind, settings))
        return description.digest()
    except (NotStableError, NotStorableError) as error:
        logger.debug("results for the %s graph are not kept on disk: %s", variant.phase.name, error)
        return None


def _settings_of_torch() -> Hashable:
    """Return what tracing and the models' code read from torch, diffusers and the environment."""
    from diffusers.models import attention_dispatch

    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    cuda: Any = torch.backends.cuda
    return (
        tuple(sys.version_info[:2]),
        platform.system(),
        torch.version.__version__,
        str(torch.version.git_version),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        torch.get_float32_matmul_precision(),
        str(getattr(registry, "_active_backend", None)),
        tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES))),
        tuple(_state_of(package) for package in _ALWAYS),
    )


@functools.cache
def _state_of(package: str) -> tuple[str, str]:
    """Return the version of a package, and a hash of its source files' sizes and times: it may be under development."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise NotStableError(f"the package {package} has no folder")
    files = []
    for folder in map(os.path.realpath, folders):
        for root, directories, names in os.walk(folder, followlinks=True):
            directories[:] = [name for name in directories if name != "__pycache__"]
            for name in names:
                if name.endswith(".py"):
                    status = os.stat(os.path.join(root, name))
                    path = Path(root, name).relative_to(folder).as_posix()
                    files.append((path, status.st_size, status.st_mtime_ns))
    return _version_of(package), hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


class _Description:
    """A hash of values that is the same in every process, for what a fingerprint and a call's key consist of."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._packages: set[str] = set()

    def digest(self) -> str:
        """Return the hash of everything added, and of the packages that its classes and functions come from."""
        for package in sorted(self._packages - set(_ALWAYS)):
            self._hash.update(repr(_state_of(package)).encode())
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Add a value.

        Raises:
            NotStableError: it may be something else in another process.
        """
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            self._text(f"{type(value).__name__} {value!r}")
        elif isinstance(value, (tuple, list)):
            self._text(f"sequence {len(value)}")
            for each in value:
                self.add(each)
        elif isinstance(value, frozenset) and all(isinstance(each, str) for each in value):
            self._text(f"set {sorted(value)}")
        elif isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            self._text(f"torch {value}")
        elif isinstance(value, type):
            self._name("class", value.__module__, value.__qualname__)
        elif isinstance(value, FunctionType):
            if value.__closure__ or "<" in value.__qualname__:
                raise NotStableError(f"{value.__qualname__} has values of its own")
            self._name("function", value.__globals__.get("__name__", ""), value.__qualname__)
        elif isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            if owner is not None and not isinstance(owner, type(sys)):
                raise NotStableError(f"{value.__qualname__} belongs to an object")
            self._name("function", value.__module__ or "", value.__qualname__)
        elif isinstance(value, pytree.TreeSpec):
            try:
                self._text(_dumped(value))
            except NotStorableError as error:
                raise NotStableError(str(error)) from error
        elif isinstance(value, Identity) and isinstance(value.value, torch.Tensor):
            try:
                self._text(f"tensor {hashlib.sha256(contents_of(value.value)).hexdigest()}")
            except NotStorableError as error:
                raise NotStableError(str(error)) from error
        else:
            raise NotStableError(f"a {type(value).__name__} differs from process to process")

    def _text(self, text: str) -> None:
        data = text.encode()
        self._hash.update(b"%d:" % len(data) + data)

    def _name(self, kind: str, module: str, name: str) -> None:
        package = module.partition(".")[0]
        if package in TRUSTED and package != "torch":
            self._packages.add(package)
        elif (
            package not in ("torch", "numpy", "builtins", "math", "_operator")
            and package not in sys.stdlib_module_names
        ):
            raise NotStableError(f"{module}.{name} is not part of a known library")
        self._text(f"{kind} {module}.{name}")


def _dumped(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:  # a class without a registered name
        raise NotStorableError(str(error)) from error


def _written_capture(captured: Captured) -> bytes:
    """Return a capture as a safetensors file: its constants, and the rest as JSON in the header."""
    program = captured.program
    tensors = {name: program.constants[name] for name in constants_of(program)}
    if not all(type(tensor) is torch.Tensor for tensor in tensors.values()):
        raise NotStorableError("it has constants that are not plain tensors")
    if sum(tensor.nbytes for tensor in tensors.values()) > _MOST_CONSTANTS:
        raise NotStorableError("its constants are too large")
    data = {
        "program": to_json(program),
        "separated": None if captured.separated is None else to_json(flat_program(program, captured.separated)),
        "origins": None if captured.origins is None else [*asdict(captured.origins).values()],
        "constant": captured.constant,
        "out_spec": _dumped(captured.out_spec),
        "input_names": captured.input_names,
        "latents": captured.latents,
        "sites": _written_sites(captured.sites),
        "separated_sites": _written_sites(captured.separated_sites),
        "roles": dict(captured.roles),
    }
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        return safetensors.torch.save(copies, {"capture": json.dumps(data)})
    except KeyError as error:  # a dtype that the format does not have, such as complex128
        raise NotStorableError(f"it has constants of the dtype {error}") from error


def _read_capture(contents: bytes, live: Mapping[str, torch.Tensor]) -> Captured:
    """Return the capture that `_written_capture` has written.

    Raises:
        NotReadableError: it has another form, or does not fit the tensors `live`.
    """
    try:
        size = int.from_bytes(contents[:8], "little")
        data = json.loads(json.loads(contents[8 : 8 + size])["__metadata__"]["capture"])
        devices = {
            node[1]: node[5][4] for node in data["program"]["nodes"] if node[0] == "placeholder" and _is_tensor(node[5])
        }
        names = {spec[2]: spec[1][1] for spec in data["program"]["inputs"]}
        constants = {name: tensor.to(devices[names[name]]) for name, tensor in safetensors.torch.load(contents).items()}
        program = from_json(data["program"], {**live, **constants})
        separated, origins = data["separated"], data["origins"]
        return Captured(
            program,
            tuple(data["input_names"]),
            data["latents"],
            pytree.treespec_loads(data["out_spec"]),
            _read_sites(data["sites"]),
            data["roles"],
            None if separated is None else from_json(separated, {**live, **constants}).graph_module,
            None if origins is None else _origins_of(*origins),
            data["constant"],
            _read_sites(data["separated_sites"]),
        )
    except NotReadableError:
        raise
    except Exception as error:  # of any class: another version, or anyone, may have written it
        raise NotReadableError(f"{type(error).__name__}: {error}") from error


def _written_sites(sites: Iterable[Site]) -> list[dict[str, Any]]:
    return [
        {**asdict(site), "dtype": _dtype_name(site.dtype), "cache_dtype": _dtype_name(site.cache_dtype)}
        for site in sites
    ]


def _read_sites(written: Iterable[dict[str, Any]]) -> tuple[Site, ...]:
    return tuple(
        Site(
            **{
                **site,
                "shape": tuple(site["shape"]),
                "dtype": getattr(torch, site["dtype"]),
                "cache_dtype": getattr(torch, site["cache_dtype"]),
            }
        )
        for site in written
    )


def _origins_of(latents: list[str], times: list[str], conditions: list[str], image: list[int] | None) -> Origins:
    rows = None if image is None else (image[0], image[1], image[2])
    return Origins(tuple(latents), tuple(times), tuple(conditions), rows)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, list) and value[0] == "tensor"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
