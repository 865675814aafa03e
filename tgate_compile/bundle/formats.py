"""The formats of bundles: what a format's module must provide, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tgate_compile._errors import BackendError, check_installed
from tgate_compile._runtimes import FORMATS, home_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from tgate_compile.bundle.calibration import Quantizing
    from tgate_compile.bundle.component_recipes import ComponentsRequest
    from tgate_compile.bundle.manifest import Components, Graph, Manifest, TensorSpec
    from tgate_compile.bundle.plan import PlannedGraph


class Session(Protocol):
    """Runs one graph."""

    @property
    def provider(self) -> str:
        """What runs it, for a person: `CPUExecutionProvider`."""
        ...

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs for all inputs, both in the order of the manifest, caches last.

        Raises:
            BackendError: the runtime fails.
        """
        ...


@runtime_checkable
class Refittable(Protocol):
    """A session whose graph can be given other weights."""

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these weights, by their names in the denoiser; those that are missing are the bundle's.

        Raises:
            BackendError: the graph cannot follow.
        """


#: Told what is being done, one line a stage.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class WrittenGraph:
    """A graph that has been written.

    Attributes:
        file: relative to the bundle.
        nodes: the number of its operators.
        entry: what it is called in a file of several.
        checked_on: the device that runs it to compare it with PyTorch's graph; None: this machine has none.
        limits: the least and the most of each free size that it takes, if that is less than what the graph takes.
        quantized: it is not as close to PyTorch's as rounding permits, and cannot be.
    """

    file: str
    nodes: int
    entry: str | None = None
    checked_on: str | None = "cpu"
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quantized: bool = False


class GraphFormat(Protocol):
    """Writes graphs, checks what was written, and opens it again. A module has this as functions."""

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `export` that the format does not know."""

    def check_load_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `load` that the format does not know."""

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


class ComponentsFormat(Protocol):
    """Writes what a pipeline has beside its denoiser, and checks what was written. A module has this as functions."""

    def write_components(
        self,
        pipe: DiffusionPipeline,
        request: ComponentsRequest,
        arguments: Sequence[str],
        latents: torch.Size,
        steps: int,
        folder: Path,
        progress: Progress,
    ) -> Components:
        """Write text encoders, tokenizers and the VAE decoder to the bundle at `folder`.

        Raises:
            BundleError: something cannot be converted, or differs from PyTorch.
        """
        ...

    def check_component(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights_size: int
    ) -> None:
        """Check a file of a bundle, whose weights are in a file of `weights_size` bytes, without trusting it.

        Raises:
            BundleError: it is not what the manifest says.
        """


class QuantizingFormat(GraphFormat, Protocol):
    """A format whose row has schemes."""

    def write_quantized(
        self,
        graphs: Sequence[PlannedGraph],
        folder: Path,
        options: Mapping[str, object],
        quantizing: Quantizing,
        progress: Progress,
    ) -> dict[str, WrittenGraph]:
        """What `write_graphs` does, for graphs of which those are `quantized` that `quantizing` says.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...


def format_called(name: str) -> GraphFormat:
    """Import the functions of the format `name`; its packages must be installed."""
    functions: GraphFormat = home_of(FORMATS[name])
    return functions


def components_format() -> str:
    """Return the format that text encoders, tokenizers and VAE decoders are written in, whatever the graphs' own is."""
    return next(entry.name for entry in FORMATS.values() if entry.components is not None)


def components_functions() -> ComponentsFormat:
    """Import the functions that write and check components; their packages must be installed."""
    module = FORMATS[components_format()].components
    assert module is not None
    functions: Any = importlib.import_module(module)
    checked: ComponentsFormat = functions
    return checked


def openers(name: str) -> dict[str, str]:
    """The backends that run graphs of the format `name`, its own first, with the format whose functions open them."""
    row = FORMATS[name]
    return {row.backend: name, **row.also}


def check_can_write(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `export` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_write, extra=row.extra, what=f'format="{name}"')


def check_can_load(name: str) -> None:
    """Raise ConfigurationError, which says what to install, unless `load` has what this format needs."""
    row = FORMATS[name]
    check_installed(*row.to_load, extra=row.extra, what=f'A bundle of format "{name}"')


def check_can_run(name: str, device: torch.device) -> None:
    """Raise BackendError, which says what is missing, unless graphs of this format run here, for inputs on `device`."""
    if not FORMATS[name].needs_gpu:
        return
    import torch  # not above: the command line reads the table for its help

    if not torch.cuda.is_available():
        raise BackendError(
            f'A bundle of format "{name}" runs on an NVIDIA GPU, and PyTorch {torch.__version__} finds none here: '
            "there is no GPU, no driver, or no CUDA in this PyTorch. On this machine, load a bundle of another "
            "format."
        )
    if device.type != "cuda":
        raise BackendError(
            f'A bundle of format "{name}" runs on an NVIDIA GPU, and the pipeline is on "{device}". Call '
            'pipe.to("cuda") first.'
        )
