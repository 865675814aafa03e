"""The interface that the module of a bundle format must provide, and access to the table of formats."""

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
        """The human-readable name of the runtime or its provider, such as `CPUExecutionProvider`."""
        ...

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on `inputs` and return all outputs, both in the order of the manifest, caches last.

        Raises:
            BackendError: the runtime fails.
        """
        ...


@runtime_checkable
class Refittable(Protocol):
    """A session whose graph's weights can be replaced."""

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights by `weights`, which has their names in the denoiser; others are taken from the bundle.

        Raises:
            BackendError: the weights of this graph cannot be replaced.
        """


#: Called with a line of text at the start of each stage.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class WrittenGraph:
    """A graph that has been written.

    Attributes:
        file: the path of the file, relative to the bundle.
        nodes: the number of operators.
        entry: the name of the graph in a file that holds several.
        checked_on: the device on which the graph is compared with PyTorch, or None if this machine cannot run it.
        limits: the smallest and the largest value of each free size, if the written graph supports a smaller range
            than the original.
        quantized: whether the graph is quantized, so that it differs from PyTorch by more than rounding.
    """

    file: str
    nodes: int
    entry: str | None = None
    checked_on: str | None = "cpu"
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quantized: bool = False


class GraphFormat(Protocol):
    """Functions that write graphs, check what was written, and open it again; usually a module."""

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `export` that the format does not know."""

    def check_load_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `load` that the format does not know."""

    def runtime_version(self) -> str:
        """Return the name and version of the runtime, for the manifest, such as `onnxruntime 1.31.1`."""
        ...

    def write_graphs(
        self, graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
    ) -> dict[str, WrittenGraph]:
        """Write `graphs` to the bundle at `folder`, and return where each was written, by name.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...

    def check_graph(self, graph: Graph, root: Path, manifest: Manifest) -> None:
        """Check the file of `graph` in the bundle at `root`, without trusting it.

        Raises:
            BundleError: the file is not what `graph` says.
        """

    def open_graph(self, graph: Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> Session:
        """Open the graph of the bundle at `root`, so that it is ready to run on `device`.

        Raises:
            BackendError: the runtime cannot open it.
        """
        ...


class ComponentsFormat(Protocol):
    """Functions that write and check a pipeline's components other than its denoiser; usually a module."""

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
        """Write the text encoders, the tokenizers and the VAE decoder to the bundle at `folder`.

        Raises:
            BundleError: a component cannot be converted, or differs from PyTorch.
        """
        ...

    def check_component(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights_size: int
    ) -> None:
        """Check a file of a bundle, whose weights are in a file of `weights_size` bytes, without trusting it.

        Raises:
            BundleError: the file does not agree with the manifest.
        """


class QuantizingFormat(GraphFormat, Protocol):
    """A format that supports quantization schemes."""

    def write_quantized(
        self,
        graphs: Sequence[PlannedGraph],
        folder: Path,
        options: Mapping[str, object],
        quantizing: Quantizing,
        progress: Progress,
    ) -> dict[str, WrittenGraph]:
        """Write `graphs` as `write_graphs` does, with those quantized that `quantizing` selects.

        Raises:
            BundleError: a graph cannot be converted.
        """
        ...


def format_called(name: str) -> GraphFormat:
    """Import the functions of the format `name`; its packages must be installed."""
    functions: GraphFormat = home_of(FORMATS[name])
    return functions


def components_format() -> str:
    """Return the format of text encoders, tokenizers and VAE decoders, which does not depend on that of the graphs."""
    return next(entry.name for entry in FORMATS.values() if entry.components is not None)


def components_functions() -> ComponentsFormat:
    """Import the functions that write and check components; their packages must be installed."""
    module = FORMATS[components_format()].components
    assert module is not None
    functions: Any = importlib.import_module(module)
    checked: ComponentsFormat = functions
    return checked


def openers(name: str) -> dict[str, str]:
    """Return the backends that run graphs of the format `name`, each with the format whose functions open them.

    The format's own backend comes first.
    """
    row = FORMATS[name]
    return {row.backend: name, **row.also}


def check_can_write(name: str) -> None:
    """Raise ConfigurationError, which says what to install, if a package that `export` needs for `name` is missing."""
    row = FORMATS[name]
    check_installed(*row.to_write, extra=row.extra, what=f'format="{name}"')


def check_can_load(name: str) -> None:
    """Raise ConfigurationError, which says what to install, if a package that `load` needs for `name` is missing."""
    row = FORMATS[name]
    check_installed(*row.to_load, extra=row.extra, what=f'A bundle of format "{name}"')


def check_can_run(name: str, device: torch.device) -> None:
    """Raise BackendError, which names what is missing, unless graphs of the format `name` can run here on `device`."""
    if not FORMATS[name].needs_gpu:
        return
    import torch  # not above: the command line reads the table for its help

    if not torch.cuda.is_available():
        raise BackendError(
            f'A bundle of format "{name}" needs an NVIDIA GPU, but PyTorch {torch.__version__} finds none: there is '
            "no GPU, no driver, or this PyTorch was built without CUDA. On this machine, load a bundle of another "
            "format."
        )
    if device.type != "cuda":
        raise BackendError(
            f'A bundle of format "{name}" needs an NVIDIA GPU, but the pipeline is on "{device}". Call '
            'pipe.to("cuda") first.'
        )
