"""Graphs as TensorRT engines, made of the ONNX files: the formats `tensorrt-rtx` and `tensorrt`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from tgate_compile._bundle import manifest as m
from tgate_compile._bundle import onnx_graphs
from tgate_compile._bundle.choose_sizes import example_sizes
from tgate_compile._bundle.describe_graph import describe_graph
from tgate_compile._bundle.formats import Progress, WrittenGraph
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.session import inputs_of, outputs_of
from tgate_compile._bundle.sizes import shape_at
from tgate_compile._bundle.tensorrt_options import (
    EngineOptions,
    Profile,
    check_gpu,
    check_load_options,
    engine_options,
    full_profile,
)
from tgate_compile._bundle.tensorrt_refit import onnx_beside
from tgate_compile._bundle.tensorrt_session import TensorRTSession
from tgate_compile._errors import BackendError, BundleError
from tgate_compile.exports.to_tensorrt import FREE, Binding, Shape, to_tensorrt

#: Where the ONNX files are while engines are built of them, if they are not to stay.
_SCRATCH = "scratch"

MSG_NOT_BUILT = "The {graph} graph is not written: {problem}"


@dataclass(frozen=True)
class TensorRTFormat:
    """The functions of a `GraphFormat`.

    Attributes:
        name: of the format, and of the backend that loads it.
        package: that builds and runs engines.
        options: what `export` may be told, of `tensorrt_options.EXPECTED`.
        load_options: what `load` may be told, of `tensorrt_options.LOAD_EXPECTED`.
        builds_on_gpu: it needs a GPU to build an engine, which is then for that one.
        built_for: compute capabilities of the GPUs that its engines are for, unless it is told others.
    """

    name: str
    package: str
    options: tuple[str, ...]
    load_options: tuple[str, ...]
    builds_on_gpu: bool
    built_for: tuple[str, ...] = ()

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options that are wrong, or need a GPU that is not there."""
        check_gpu(self.name, self._options(options), always=self.builds_on_gpu)

    def check_load_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `load` that are wrong."""
        check_load_options(self.name, self.load_options, options)

    def runtime_version(self) -> str:
        """What built the engines, and runs them: `tensorrt_rtx 1.7.1.116`."""
        return f"{self.package} {version(self.package)}"

    def write_graphs(
        self, graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
    ) -> dict[str, WrittenGraph]:
        """Write an engine for each of `graphs` to the bundle at `folder`.

        Raises:
            BundleError: a graph cannot be converted, or no engine can be built of it.
            ConfigurationError: the profile does not fit the graphs.
        """
        asked = self._options(options)
        profiles = {planned.name: full_profile(asked.profile, example_sizes(planned)) for planned in graphs}
        home = folder if asked.keeps_onnx else folder / _SCRATCH
        home.mkdir(exist_ok=True)
        models = onnx_graphs.write_graphs(graphs, home, {}, progress)
        (folder / m.GRAPHS_FOLDER).mkdir(exist_ok=True)
        written = {}
        for planned in graphs:
            progress(f"Building the engine of the {planned.name} graph")
            model, profile = models[planned.name], profiles[planned.name]
            file = f"{m.GRAPHS_FOLDER}/{planned.name}.engine"
            graph = describe_graph(planned, file, None, model.nodes)
            (folder / file).write_bytes(self._engine(graph, home / model.file, profile, asked))
            written[planned.name] = WrittenGraph(
                file,
                model.nodes,
                checked_on=self._gpu(asked),
                limits={name: (least, most) for name, (least, _, most) in profile.items()},
            )
        if home != folder:
            shutil.rmtree(home)
        return written

    def check_graph(self, graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
        """Check what `open_graph` would read beside an engine without weights; raise BundleError.

        Nobody but TensorRT can look into an engine, and it does so on a GPU only.
        """
        model = onnx_beside(root / graph.file)
        if model.exists():
            if manifest.weights is None:
                raise BundleError(MSG_NOT_BUILT.format(graph=graph.file, problem="its weights are not there."))
            onnx_file = graph.model_copy(update={"file": model.relative_to(root).as_posix()})
            onnx_graphs.check_graph(onnx_file, root, manifest)

    def open_graph(
        self, graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]
    ) -> TensorRTSession:
        """The engine, ready to run; raise BackendError."""
        return TensorRTSession(self.package, graph, root / graph.file, device, options)

    def _options(self, options: Mapping[str, object]) -> EngineOptions:
        return engine_options(self.name, self.package, self.options, options)

    def _engine(self, graph: m.Graph, model: Path, profile: Profile, asked: EngineOptions) -> memoryview:
        inputs, outputs = inputs_of(graph), outputs_of(graph)
        try:
            engine = to_tensorrt(
                self.package,
                model,
                [_binding(spec) for spec in inputs],
                [_binding(spec) for spec in outputs],
                {spec.name: _bounds(spec, profile) for spec in inputs if _is_free(spec)},
                asked.settings,
            )
        except BackendError as error:
            raise BundleError(MSG_NOT_BUILT.format(graph=model.stem, problem=error)) from error
        return memoryview(engine)

    def _gpu(self, asked: EngineOptions) -> str | None:
        """The GPU, if there is one that the engines are built for."""
        if not torch.cuda.is_available():
            return None
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        return "cuda" if here in (asked.settings.compute_capabilities or self.built_for or (here,)) else None


RTX = TensorRTFormat(
    name="tensorrt-rtx",
    package="tensorrt_rtx",
    options=("profile", "compute_capabilities", "weight_streaming", "strip", "refit"),
    load_options=("weight_budget", "runtime_cache"),
    builds_on_gpu=False,
    # NVIDIA's own choice: all that it knows but Turing, which would slow the others down.
    built_for=("8.0", "8.6", "8.9", "12.0", "12.1"),
)
ENTERPRISE = TensorRTFormat(
    name="tensorrt",
    package="tensorrt",
    options=(
        "profile",
        "timing_cache",
        "version_compatible",
        "hardware_compatible",
        "weight_streaming",
        "strip",
        "refit",
    ),
    load_options=("weight_budget", "host_code"),
    builds_on_gpu=True,
)


def _binding(spec: m.TensorSpec) -> Binding:
    shape = tuple(size if isinstance(size, int) else FREE for size in spec.shape)
    return Binding(spec.name, getattr(torch, spec.dtype), shape)


def _is_free(spec: m.TensorSpec) -> bool:
    return any(not isinstance(size, int) for size in spec.shape)


def _bounds(spec: m.TensorSpec, profile: Profile) -> tuple[Shape, Shape, Shape]:
    """The least, the usual and the largest shape of an input."""
    least, usual, most = (
        shape_at(spec.shape, {name: bounds[position] for name, bounds in profile.items()}) for position in range(3)
    )
    return least, usual, most
