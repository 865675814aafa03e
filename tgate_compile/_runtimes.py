"""The table of runtimes, gathered from the folders of `exports/`: what runs graphs live, and what bundles are made of.

Each folder of `exports/` describes itself in its `__init__.py`, in plain data: `BACKENDS` for `optimize(backend=...)`
and `FORMATS` for `export(format=...)`. Every other list (the command line's choices, the manifest's, the order of
`backend="auto"`) is derived from here, and nothing that is heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tgate_compile._errors import check_installed, is_installed

#: The package whose subpackages are the runtimes. It is found at run time: what is here is below it.
_EXPORTS = "tgate_compile.exports"


@dataclass(frozen=True)
class BackendEntry:
    """A backend of `optimize`.

    Attributes:
        name: the value of `backend=`.
        home: where its class is, as `module:name`; the class implements `tgate_compile.engine.backends.Backend`.
        needs: the modules that must be installed.
        extra: the extra of tgate_compile that installs them.
        automatic: for each type of device on which `backend="auto"` considers it, its rank: the lowest comes first.
        needs_gpu: it runs on NVIDIA GPUs only.
    """

    name: str
    home: str
    needs: tuple[str, ...] = ()
    extra: str | None = None
    automatic: Mapping[str, int] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass(frozen=True)
class FormatEntry:
    """A format of bundles.

    Attributes:
        name: the value of `format=`.
        home: where its functions are, as `module` or `module:object`; see `tgate_compile.bundle.formats.GraphFormat`.
        backend: what `load` runs it with.
        extra: the extra of tgate_compile that installs its packages.
        to_write: the modules that `export` needs.
        to_load: the modules that `load` needs.
        needs_gpu: its graphs run on NVIDIA GPUs only.
        fixed_sizes: every size of its graphs is fixed when they are written.
        also: other backends that `load` accepts, each with the format whose functions open the graphs for it.
        quantized_weights: it accepts weights that torchao has quantized.
        schemes: the quantization schemes that it supports; if there are any, its functions are a `QuantizingFormat`.
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
            assert entry.name not in entries, f"two runtimes call themselves {entry.name!r}"
            entries[entry.name] = entry
    return entries


#: The backends of `optimize`, by name.
BACKENDS: Mapping[str, BackendEntry] = {**_gathered("BACKENDS", BackendEntry), EAGER.name: EAGER}

#: The formats of `export`, by name.
FORMATS: Mapping[str, FormatEntry] = _gathered("FORMATS", FormatEntry)


def home_of(entry: BackendEntry | FormatEntry) -> Any:
    """Import what `entry.home` names. Its packages must be installed."""
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
    """Return what `backend="auto"` tries on a type of device, in order: what is installed, the fastest first.

    The ranks in the table are measured; docs/evidence/benchmarks.md has the figures.
    """
    considered = [entry for entry in BACKENDS.values() if device in entry.automatic and is_installed(*entry.needs)]
    return [entry.name for entry in sorted(considered, key=lambda entry: entry.automatic[device])] or ["eager"]
