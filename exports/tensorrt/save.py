"""Write a bundle's graphs as TensorRT engines, and the options for that."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tgate_compile._arguments import check_names
from tgate_compile._errors import BackendError, BundleError, ConfigurationError
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph, inputs_of, outputs_of
from tgate_compile.bundle.plan import PlannedGraph, describe_graph, example_sizes
from tgate_compile.bundle.read_manifest import shape_at
from tgate_compile.engine.free_sizes import LARGEST, SYMBOLS
from tgate_compile.exports.onnx import save as onnx_graphs
from tgate_compile.exports.tensorrt.convert import FREE, Binding, EngineSettings, Shape, to_tensorrt
from tgate_compile.exports.tensorrt.open import TensorRTSession, onnx_beside

#: The least, the usual and the most of each free size.
Profile = Mapping[str, tuple[int, int, int]]

MSG_OPTION = 'format_options["{name}"] must be {expected}, but got {given!r}.'
MSG_LOAD_OPTION = 'backend_options["{name}"] must be {expected}, but got {given!r}.'
MSG_NEEDS_GPU = (
    "{what} needs an NVIDIA GPU where engines are built, and PyTorch finds none here. {instead} Or export on a machine "
    "with one."
)
MSG_NOT_FREE = (
    'format_options["profile"] has the size {name!r}, which these graphs do not leave free. They leave free: {free}.'
)
MSG_OUTSIDE = (
    'format_options["profile"] has {name} from {least} to {most}, and the call that the bundle is made with has '
    "{example}. Give export() another call, or the profile other bounds."
)

_LARGEST = {SYMBOLS[name]: most for name, most in LARGEST.items()}
_HARDWARE = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}

_BOOL = "True or False"
#: Options of `export`, and what they must be.
EXPECTED: Mapping[str, str] = {
    "profile": (
        "a mapping from names of b, h and w to three whole numbers, the least, the usual and the most, such as "
        '{"h": (4, 8, 16)}'
    ),
    "weight_streaming": _BOOL,
    "strip": _BOOL,
    "refit": _BOOL,
    "compute_capabilities": "a list of some of {capabilities}",
    "version_compatible": _BOOL,
    "hardware_compatible": " or ".join(f'"{name}"' for name in _HARDWARE),
    "timing_cache": "the path of a file, in a folder that exists",
}


@dataclass(frozen=True)
class EngineOptions:
    """What was asked for.

    Attributes:
        settings: of the build.
        profile: bounds of free sizes; those that are not in it have their defaults.
        keeps_onnx: engines take their weights from the bundle's weights file, by the ONNX files.
    """

    settings: EngineSettings
    profile: Profile
    keeps_onnx: bool


def engine_options(format: str, package: str, known: Collection[str], options: Mapping[str, object]) -> EngineOptions:
    """The options of `export` for the format, whose package knows `known` of `EXPECTED`.

    Raises:
        ConfigurationError: they are wrong.
    """
    check_names(options, known, f'format="{format}"')
    capabilities = _capabilities(package) if "compute_capabilities" in options else ()
    checks: Mapping[str, Callable[[Any], bool]] = {
        "profile": _is_profile,
        "compute_capabilities": lambda given: _is_list(given) and bool(given) and set(given) <= set(capabilities),
        "hardware_compatible": lambda given: isinstance(given, str) and given in _HARDWARE,
        "timing_cache": lambda given: isinstance(given, (str, os.PathLike)) and Path(given).parent.is_dir(),
    }
    for name, given in options.items():
        if not checks.get(name, lambda given: isinstance(given, bool))(given):
            expected = EXPECTED[name].replace("{capabilities}", ", ".join(capabilities))
            raise ConfigurationError(MSG_OPTION.format(name=name, expected=expected, given=given))
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
        flags=tuple(flag for flag, wanted in flags.items() if wanted),
        compute_capabilities=tuple(choices.get("compute_capabilities", ())),
        hardware_compatibility=_HARDWARE.get(choices.get("hardware_compatible", "")),
        timing_cache=None if cache is None else Path(cache),
    )
    profile = {name: (int(a), int(b), int(c)) for name, (a, b, c) in choices.get("profile", {}).items()}
    return EngineOptions(settings, profile, strip)


def full_profile(given: Profile, example: Mapping[str, int]) -> Profile:
    """Bounds for each free size of a graph, of which `example` has one choice.

    The defaults: batches from 1 to twice the example's, heights and widths from half of it to twice of it.

    Raises:
        ConfigurationError: `given` has another size, or does not have the example in its bounds.
    """
    for name in given:
        if name not in example:
            raise ConfigurationError(MSG_NOT_FREE.format(name=name, free=", ".join(example) or "none"))
    profile = {}
    for name, size in example.items():
        half = 1 if name == SYMBOLS["batch"] else max(1, size // 2)
        least, usual, most = given.get(name, (half, size, min(2 * size, _LARGEST[name])))
        if not least <= size <= most:
            raise ConfigurationError(MSG_OUTSIDE.format(name=name, least=least, most=most, example=size))
        profile[name] = (least, usual, most)
    return profile


#: Options of `load`, and what they must be.
LOAD_EXPECTED: Mapping[str, str] = {
    "weight_budget": "a whole number of bytes: of the weights, so many stay in the GPU's memory",
    "runtime_cache": "a folder that exists",
    "host_code": _BOOL,
}


def check_load_options(format: str, known: Collection[str], options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options of `load` that are not among `known` of `LOAD_EXPECTED`, or wrong."""
    check_names(options, known, f'backend="{format}"')
    budget, cache = options.get("weight_budget", 0), options.get("runtime_cache", ".")
    right = {
        "weight_budget": isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0,
        "runtime_cache": isinstance(cache, (str, os.PathLike)) and Path(cache).is_dir(),
        "host_code": isinstance(options.get("host_code", True), bool),
    }
    for name in options:
        if not right[name]:
            expected = LOAD_EXPECTED[name]
            raise ConfigurationError(MSG_LOAD_OPTION.format(name=name, expected=expected, given=options[name]))


def check_gpu(format: str, options: EngineOptions, *, always: bool) -> None:
    """Raise ConfigurationError if engines need a GPU to be built, as they `always` do or with these options only, and
    there is none."""
    if torch.cuda.is_available():
        return
    if always:
        instead = 'format="tensorrt-rtx" builds without one, and format="onnx" does, too.'
        raise ConfigurationError(MSG_NEEDS_GPU.format(what=f'format="{format}"', instead=instead))
    if options.keeps_onnx:
        option = "refit" if "REFIT" in options.settings.flags else "strip"
        what, instead = (
            f'format_options["{option}"]',
            f"Leave {option} out: the engines then have their weights inside.",
        )
        raise ConfigurationError(MSG_NEEDS_GPU.format(what=what, instead=instead))


def _capabilities(package: str) -> tuple[str, ...]:
    """Those of the GPUs that the package builds for: `8.9` for its SM89."""
    members = importlib.import_module(package).ComputeCapability.__members__
    numbers = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def _is_list(given: object) -> bool:
    return isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)


def _is_profile(given: object) -> bool:
    if not isinstance(given, Mapping) or not set(given) <= set(_LARGEST):
        return False
    return all(_is_range(name, bounds) for name, bounds in given.items())


def _is_range(name: str, bounds: object) -> bool:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 3 or {type(bound) for bound in bounds} != {int}:
        return False
    least, usual, most = bounds
    return bool(1 <= least <= usual <= most <= _LARGEST[name])


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
