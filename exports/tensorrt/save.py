"""Write the graphs of a bundle as TensorRT engines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tgate_compile._errors import BackendError, BundleError, ConfigurationError
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph, describe_graph, example_sizes
from tgate_compile.bundle.read_manifest import inputs_of, outputs_of, shape_at
from tgate_compile.engine.backends import SWITCH, Option, at_least, check_known_options, one_of
from tgate_compile.engine.capture import LARGEST, SYMBOLS
from tgate_compile.exports.onnx import save as onnx_graphs
from tgate_compile.exports.tensorrt.convert import FREE, Binding, EngineSettings, Shape, to_tensorrt
from tgate_compile.exports.tensorrt.open import TensorRTSession, onnx_beside, supported_capabilities

#: The smallest, the typical and the largest value of each free size.
Profile = Mapping[str, tuple[int, int, int]]

MSG_NEEDS_GPU = (
    "{what} needs an NVIDIA GPU to build engines, but PyTorch finds none here. {instead} Or export on a machine that "
    "has one."
)

_LARGEST = {SYMBOLS[name]: most for name, most in LARGEST.items()}
_HARDWARE = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}


def _is_profile(given: object) -> bool:
    if not isinstance(given, Mapping) or not set(given) <= set(_LARGEST):
        return False
    return all(_is_range(name, bounds) for name, bounds in given.items())


def _is_range(name: str, bounds: object) -> bool:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 3 or {type(bound) for bound in bounds} != {int}:
        return False
    least, usual, most = bounds
    return bool(1 <= least <= usual <= most <= _LARGEST[name])


#: The options of `export`, except `compute_capabilities`, which depends on the package.
OPTIONS: Mapping[str, Option] = {
    "profile": Option(
        "a mapping from the names b, h and w to three integers, the smallest, the typical and the largest value, such "
        'as {"h": (4, 8, 16)}',
        _is_profile,
    ),
    "weight_streaming": SWITCH,
    "strip": SWITCH,
    "refit": SWITCH,
    "version_compatible": SWITCH,
    "hardware_compatible": one_of(_HARDWARE),
    "timing_cache": Option(
        "the path of a file, in a folder that exists",
        lambda given: isinstance(given, (str, os.PathLike)) and Path(given).parent.is_dir(),
    ),
}
#: The options of `load`.
LOAD_OPTIONS: Mapping[str, Option] = {
    "weight_budget": at_least(0, "a whole number of bytes, the size of the weights that stay in the GPU's memory"),
    "runtime_cache": Option(
        "a folder that exists", lambda given: isinstance(given, (str, os.PathLike)) and Path(given).is_dir()
    ),
    "host_code": SWITCH,
}


@dataclass(frozen=True)
class EngineOptions:
    """The validated options of `export`.

    Attributes:
        settings: the settings of the build.
        profile: the bounds of free sizes; other free sizes have default bounds.
        keeps_onnx: whether engines take their weights from the bundle's weights file, with the help of the ONNX files.
    """

    settings: EngineSettings
    profile: Profile
    keeps_onnx: bool


def engine_options(format: str, package: str, known: Collection[str], options: Mapping[str, object]) -> EngineOptions:
    """Return the validated options of `export` for the format, which supports the options `known`.

    Raises:
        ConfigurationError: an option is not valid.
    """
    of_format = {
        name: _capabilities_option(package) if name == "compute_capabilities" else OPTIONS[name] for name in known
    }
    check_known_options(f'format="{format}"', "format_options", options, of_format)
    refit = options.get("refit") is True
    strip = refit or options.get("strip") is True
    flags = {
        "STRIP_PLAN": strip,
        "REFIT": refit,
        "REFIT_IDENTICAL": strip and not refit,
        "WEIGHT_STREAMING": options.get("weight_streaming"),
        "VERSION_COMPATIBLE": options.get("version_compatible"),
    }
    choices: Mapping[str, Any] = options
    cache = choices.get("timing_cache")
    settings = EngineSettings(
        flags=tuple(flag for flag, is_set in flags.items() if is_set),
        compute_capabilities=tuple(choices.get("compute_capabilities", ())),
        hardware_compatibility=_HARDWARE.get(choices.get("hardware_compatible", "")),
        timing_cache=None if cache is None else Path(cache),
    )
    profile = {name: (int(a), int(b), int(c)) for name, (a, b, c) in choices.get("profile", {}).items()}
    return EngineOptions(settings, profile, strip)


def full_profile(given: Profile, example: Mapping[str, int]) -> Profile:
    """Return bounds for each free size of a graph, whose values in the example call are `example`.

    The default bounds are 1 and twice the example for batches, and half and twice the example for heights and widths.

    Raises:
        ConfigurationError: `given` has a size that is not free, or bounds that exclude the example.
    """
    for name in given:
        if name not in example:
            raise ConfigurationError(
                f'format_options["profile"] has the size {name!r}, which is not free in these graphs. Their free sizes '
                f"are: {', '.join(example) or 'none'}."
            )
    profile = {}
    for name, size in example.items():
        half = 1 if name == SYMBOLS["batch"] else max(1, size // 2)
        least, usual, most = given.get(name, (half, size, min(2 * size, _LARGEST[name])))
        if not least <= size <= most:
            raise ConfigurationError(
                f'format_options["profile"] has {name} from {least} to {most}, but the call that the bundle is made '
                f"with has {size}. Pass another call to export(), or change the bounds."
            )
        profile[name] = (least, usual, most)
    return profile


def check_load_options(format: str, known: Collection[str], options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options of `load` that are not among `known`, or not valid."""
    of_backend = {name: LOAD_OPTIONS[name] for name in known}
    check_known_options(f'backend="{format}"', "backend_options", options, of_backend)


def check_gpu(format: str, options: EngineOptions, *, always: bool) -> None:
    """Raise ConfigurationError if building engines needs a GPU and there is none.

    It needs one with some of the options, or in some formats `always`.
    """
    if torch.cuda.is_available():
        return
    if always:
        instead = 'Use format="tensorrt-rtx" or format="onnx", which do not need one.'
        raise ConfigurationError(MSG_NEEDS_GPU.format(what=f'format="{format}"', instead=instead))
    if options.keeps_onnx:
        option = "refit" if "REFIT" in options.settings.flags else "strip"
        what, instead = (
            f'format_options["{option}"]',
            f"Leave {option} out, so that the engines contain their weights.",
        )
        raise ConfigurationError(MSG_NEEDS_GPU.format(what=what, instead=instead))


def _capabilities_option(package: str) -> Option:
    """Return the option for the compute capabilities that the package supports, such as `8.9` for its SM89."""
    names = supported_capabilities(package)
    return Option(
        f"a list of some of {', '.join(names)}",
        lambda given: isinstance(given, (list, tuple)) and bool(given) and all(name in names for name in given),
    )


#: The temporary folder for the ONNX files that engines are built from, unless these files are kept.
_SCRATCH = "scratch"


@dataclass(frozen=True)
class TensorRTFormat:
    """A `GraphFormat` for one of the TensorRT packages.

    Attributes:
        name: the name of the format, and of the backend that loads it.
        package: the package that builds and runs engines.
        options: the names of the options of `export`.
        load_options: the names of the options of `load`, out of `LOAD_OPTIONS`.
        builds_on_gpu: whether building an engine needs a GPU, for which the engine is then built.
        built_for: the compute capabilities that engines are built for by default.
    """

    name: str
    package: str
    options: tuple[str, ...]
    load_options: tuple[str, ...]
    builds_on_gpu: bool
    built_for: tuple[str, ...] = ()

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options that are not valid, or that need a GPU if there is none."""
        check_gpu(self.name, self._options(options), always=self.builds_on_gpu)

    def check_load_options(self, options: Mapping[str, object]) -> None:
        """Raise ConfigurationError for options of `load` that are not valid."""
        check_load_options(self.name, self.load_options, options)

    def runtime_version(self) -> str:
        """Return the package that builds and runs engines, with its version, such as `tensorrt_rtx 1.7.1.116`."""
        return f"{self.package} {version(self.package)}"

    def write_graphs(
        self, graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
    ) -> dict[str, WrittenGraph]:
        """Write an engine for each of `graphs` to the bundle at `folder`.

        Raises:
            BundleError: a graph cannot be converted, or no engine can be built from it.
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
        """Raise BundleError unless the ONNX file and the weights of a stripped engine are valid.

        The engine itself cannot be checked: only TensorRT can read it, and only on a GPU.
        """
        model = onnx_beside(root / graph.file)
        if model.exists():
            if manifest.weights is None:
                raise BundleError(
                    f"The engine {graph.file} of the bundle {root} needs weights, but the bundle has none."
                )
            onnx_file = graph.model_copy(update={"file": model.relative_to(root).as_posix()})
            onnx_graphs.check_graph(onnx_file, root, manifest)

    def open_graph(
        self, graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]
    ) -> TensorRTSession:
        """Open the engine, so that it is ready to run, or raise BackendError."""
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
            raise BundleError(f"The {model.stem} graph cannot be written: {error}") from error
        return memoryview(engine)

    def _gpu(self, asked: EngineOptions) -> str | None:
        """Return the device of the GPU, or None unless there is one that the engines are built for."""
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
    # NVIDIA's default: all supported ones except Turing, which would slow the others down.
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
    """Return the smallest, the typical and the largest shape of an input."""
    least, usual, most = (
        shape_at(spec.shape, {name: bounds[position] for name, bounds in profile.items()}) for position in range(3)
    )
    return least, usual, most
