"""What graphs can be written as: a row per format. Adding a format is a module and a row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from tgate_compile._installed import check_installed

if TYPE_CHECKING:
    from tgate_compile._bundle.manifest import Graph, Manifest
    from tgate_compile._bundle.planned_graphs import PlannedGraph
    from tgate_compile._bundle.session import Session

#: Told what is being done, one line a stage.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class WrittenGraph:
    """A graph that has been written.

    Attributes:
        file: relative to the bundle.
        nodes: the number of its operators.
        entry: what it is called in a file of several.
    """

    file: str
    nodes: int
    entry: str | None = None


class GraphFormat(Protocol):
    """Writes graphs, checks what was written, and opens it again. A module has this as functions."""

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `export` that the format does not know."""

    def runtime_version(self) -> str:
        """What made the graphs, for the manifest: `onnxruntime 1.31.1`."""
        ...

    def write_graphs(
        self, graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
    ) -> dict[str, WrittenGraph]:
        """Write `graphs` to the bundle at `folder`; tell where each is, by its name.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...

    def check_graph(self, graph: Graph, root: Path, manifest: Manifest) -> None:
        """Look at a file of the bundle `root`, read from wherever, with suspicion.

        Raises:
            BundleError: it is not what `graph` says.
        """

    def open_graph(self, graph: Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
        """The graph of the bundle at `root`, ready to run.

        Raises:
            BackendError: the runtime does not take it.
        """
        ...


@dataclass(frozen=True)
class Row:
    """What is said of a format before any of its packages is imported.

    Attributes:
        module: has the functions of `GraphFormat`.
        backend: what `load` runs it with.
        extra: of tgate_compile, with the packages that it needs.
        to_write: modules that `export` needs.
        to_load: modules that `load` needs.
        checks_here: its graphs run wherever they are written, and are compared with PyTorch's.
    """

    module: str
    backend: str
    extra: str
    to_write: tuple[str, ...]
    to_load: tuple[str, ...]
    checks_here: bool = True


FORMATS: Mapping[str, Row] = {
    "onnx": Row(
        "tgate_compile._bundle.onnx_graphs",
        backend="onnxruntime",
        extra="onnx",
        to_write=("onnx", "onnxscript", "onnxruntime", "pydantic"),
        to_load=("onnx", "onnxruntime", "pydantic"),
    ),
}


def format_called(name: str) -> GraphFormat:
    """The format's functions; its packages must be there."""
    module: GraphFormat = importlib.import_module(FORMATS[name].module)
    return module


def check_can_write(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `export` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_write, extra=row.extra, what=f'format="{name}"')


def check_can_load(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `load` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_load, extra=row.extra, what=f'A bundle of format "{name}"')
