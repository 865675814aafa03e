"""The tables of backends and formats, gathered from the folders of `exports/`.

The `__init__.py` of each folder describes the runtime as plain data: `BACKENDS` for `optimize(backend=...)` and
`FORMATS` for `export(format=...)`. Every other list (the choices of the command line, those of the manifest, the order
of `backend="auto"`) is derived from these tables. Heavy packages are not imported before they are used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tgate_compile._errors import check_installed, is_installed

#: The package whose subpackages are the runtimes. It is imported by name, since its modules import this one.
_EXPORTS = "tgate_compile.exports"


@dataclass(frozen=True)
class BackendEntry:
    """A backend of `optimize`.

    Attributes:
        name: the value of `backend=`.
        home: the location of its class, as `module:name`; it implements `tgate_compile.engine.backends.Backend`.
        needs: the modules that must be installed.
        extra: the extra of tgate_compile that installs them.
        automatic: its rank for each device type on which `backend="auto"` considers it; the lowest is tried first.
        attempts: the options that `backend="auto"` tries in turn on a device type; without an entry, none.
        precision_option: its own option for the dtype that it computes in; without one, graphs are rewritten for it.
        lacks: why it cannot compute in a dtype on a type of device, by both: `{"cpu bfloat16": "it has no kernels"}`.
        needs_gpu: whether it runs on NVIDIA GPUs only.
    """

    name: str
    home: str
    needs: tuple[str, ...] = ()
    extra: str | None = None
    automatic: Mapping[str, int] = field(default_factory=dict)
    attempts: Mapping[str, tuple[Mapping[str, object], ...]] = field(default_factory=dict)
    precision_option: str | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass(frozen=True)
class FormatEntry:
    """A format of bundles.

    Attributes:
        name: the value of `format=`.
        home: the location of its functions, as `module` or `module:object`; see
            `tgate_compile.bundle.formats.GraphFormat`.
        backend: the backend that `load` uses by default.
        extra: the extra of tgate_compile that installs its packages.
        to_write: the modules that `export` needs.
        to_load: the modules that `load` needs.
        needs_gpu: whether its graphs run on NVIDIA GPUs only.
        fixed_sizes: whether all sizes of its graphs are fixed when they are written.
        also: other backends that `load` accepts, each with the format whose functions open the graphs for it.
        quantized_weights: whether it accepts weights that torchao has quantized.
        schemes: the quantization schemes that it supports; if there are any, its functions are a `QuantizingFormat`.
        splits: whether `export` splits its graphs by binding time unless the user decides: it saves memory where one
            graph at a time is open.
        components: the module that writes text encoders, tokenizers and VAE decoders in this format, if there is one.
    """

    name: str
    home: str
    backend: str
    extra: str
    to_write: tuple[str, ...]
    to_load: tuple[str, ...]
    needs_gpu: bool = False
    fixed_sizes: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    quantized_weights: bool = True
    schemes: tuple[str, ...] = ()
    splits: bool = False
    components: str | None = None


Entry = TypeVar("Entry", BackendEntry, FormatEntry)

EAGER = BackendEntry(
    "eager", "tgate_compile.engine.backends:EagerBackend", automatic={"cpu": 100, "cuda": 100, "mps": 100, "xpu": 100}
)


def _gathered(attribute: str, kind: type[Entry]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for found in pkgutil.iter_modules(importlib.import_module(_EXPORTS).__path__):
        runtime = importlib.import_module(f"{_EXPORTS}.{found.name}")
        for entry in getattr(runtime, attribute, ()):
            assert isinstance(entry, kind), f"{runtime.__name__}.{attribute} holds {entry!r}"
            assert entry.name not in entries, f"two runtimes have the name {entry.name!r}"
            entries[entry.name] = entry
    return entries


#: The backends of `optimize`, by name.
BACKENDS: Mapping[str, BackendEntry] = {**_gathered("BACKENDS", BackendEntry), EAGER.name: EAGER}

#: The formats of `export`, by name.
FORMATS: Mapping[str, FormatEntry] = _gathered("FORMATS", FormatEntry)


def home_of(entry: BackendEntry | FormatEntry) -> Any:
    """Import and return the object that `entry.home` refers to, whose packages must be installed."""
    module, _, attribute = entry.home.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def is_backend_installed(name: str) -> bool:
    """Return whether everything that the backend `name` needs is installed."""
    return is_installed(*BACKENDS[name].needs)


def check_backend_installed(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless the backend `name`, or `auto`, can run here."""
    if name != "auto":
        entry = BACKENDS[name]
        check_installed(*entry.needs, extra=entry.extra or "", what=f'backend="{name}"')


def automatic_backends(device: str) -> list[str]:
    """Return the installed backends that `backend="auto"` tries on a type of device, the fastest first.

    The ranks in the table are measured; docs/evidence/benchmarks.md has the figures.
    """
    return [name for name in ranked_backends(device) if is_backend_installed(name)]


def ranked_backends(device: str) -> list[str]:
    """Return the backends that `backend="auto"` considers on a type of device, the fastest first, installed or not."""
    considered = [entry for entry in BACKENDS.values() if device in entry.automatic]
    return [entry.name for entry in sorted(considered, key=lambda entry: entry.automatic[device])] or [EAGER.name]
