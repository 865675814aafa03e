"""Compile a bundle's graphs with AOTInductor; their weights stay outside."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import InvalidCxxCompiler

from tgate_compile._arguments import check_names
from tgate_compile._errors import BundleError, ConfigurationError
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.weights import INDEX_FILE, WeightsFile, read_index, write_weights
from tgate_compile.exports.inductor.live import CPU_OPTIONS
from tgate_compile.exports.inductor.open import AotiSession, check_package, entry_name
from tgate_compile.passes.editing import copy_graph, flat_program
from tgate_compile.passes.graphs import Variant

logger = logging.getLogger(__name__)

#: The code asks for its weights by their qualified names when it is loaded.
WITHOUT_WEIGHTS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}


def to_aoti(variant: Variant, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Compile `variant` into files in `folder`, for `torch._inductor.package.package_aoti`.

    The code takes the variant's inputs and then its caches, contiguous and flat, and returns its outputs. It expects
    contiguous weights, whatever strides the variant's own have; `options` are Inductor's.

    Raises:
        Exception: of any class; Inductor has no common base class of its errors.
    """
    began = time.perf_counter()
    program = flat_program(variant.program, copy_graph(variant.program.graph_module))  # Inductor rewrites it
    graph_module: Any = program.module(check_guards=False)
    _name_constants(graph_module, program.constants)
    _make_contiguous(graph_module)
    placeholders = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    examples = tuple(fake.contiguous() for fake in placeholders[len(variant.weights) :])
    with _quiet_exporter(), torch.no_grad():
        files: Any = torch._inductor.aot_compile(
            graph_module, examples, options={**WITHOUT_WEIGHTS, **options, "aot_inductor.output_path": str(folder)}
        )
    logger.info("compiled the %s graph in %.1f s", variant.phase.name, time.perf_counter() - began)
    return [str(file) for file in files]


def _name_constants(module: torch.nn.Module, constants: Iterable[str]) -> None:
    """Have the code ask for constants by these names: Inductor numbers tensors that are no buffers."""
    for name in constants:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        value = owner.__dict__.get(attribute)
        if isinstance(value, torch.Tensor):
            delattr(owner, attribute)
            owner.register_buffer(attribute, value, persistent=False)


def _make_contiguous(module: torch.nn.Module) -> None:
    """Give `module`, not the user's, weights in C order; what has it already is not copied."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_contiguous():
                owner._parameters[name] = torch.nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_contiguous():
                owner._buffers[name] = buffer.contiguous()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch says of its own doings: a deprecation when it copies a program, and that the few complex
    operators, such as FreeU's Fourier transforms, are called as they are, not fused.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*code generation for complex operators.*")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        yield


PACKAGE_FILE = "graphs/graphs.pt2"

#: What the code may be for: the CPU that compiles it, or every one of a level (AVX2 and FMA).
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "native": {},
    "x86-64-v3": {"cpp.march": "x86-64-v3", "cpp.simdlen": 256},
}

MSG_TARGET = 'format_options["target"] must be {expected}, but got {given!r}.'
MSG_NEWER_TORCH = (
    'format_options["target"]={given!r} needs a newer torch than {torch}, whose Inductor has no {missing}.'
)
MSG_NO_LOAD_OPTIONS = (
    'A bundle of format "aoti" has no backend_options, but got {given}. It runs on as many threads as '
    "torch.set_num_threads() says."
)
MSG_NO_COMPILER = 'format="aoti" compiles C++ and needs a compiler such as g++, which is not there ({problem}).'
MSG_NOT_COMPILED = (
    "AOTInductor cannot compile the {graph} graph: {problem}. Nothing has been written. On a CPU it needs a C++ "
    "compiler, on a GPU Triton and the CUDA toolkit as well. {hint}"
)
MSG_NOT_PACKED = "torch cannot write the package of the compiled graphs: {problem}. Nothing has been written."
MSG_DYNAMIC = "Some code is compiled for fixed sizes only: try export(..., dynamic=False)."
MSG_LAYOUT = "The graphs of the bundle {root} must be entries of {package} with their own names, and {index} be there."


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for unknown options, or if nothing can be compiled here."""
    check_names(options, ["target"], 'format="aoti"')
    target = options.get("target", "native")
    if not isinstance(target, str) or target not in TARGETS:
        known = " or ".join(f'"{name}"' for name in TARGETS)
        raise ConfigurationError(MSG_TARGET.format(expected=known, given=target))
    missing = ", ".join(name for name in TARGETS[target] if name not in torch._inductor.list_options())
    if missing:
        raise ConfigurationError(MSG_NEWER_TORCH.format(given=target, torch=torch.__version__, missing=missing))
    _check_compiler()


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError: there are none."""
    if options:
        raise ConfigurationError(MSG_NO_LOAD_OPTIONS.format(given=", ".join(map(repr, options))))


def runtime_version() -> str:
    """What compiled the graphs."""
    return f"AOTInductor {torch.__version__}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`: a package, the weights, and what is where among these.

    Raises:
        BundleError: a graph cannot be compiled.
    """
    from torch._inductor.package.package import package_aoti

    (folder / m.GRAPHS_FOLDER).mkdir()
    device = graphs[0].example_inputs[0].device.type
    written = {}
    with tempfile.TemporaryDirectory() as home:
        files: Any = {}
        for planned in graphs:
            progress(f"Compiling the {planned.name} graph")
            files[entry_name(planned.name)] = _compiled(planned, Path(home, planned.name), device, options)
            nodes = sum(node.op == "call_function" for node in planned.variant.program.graph.nodes)
            written[planned.name] = WrittenGraph(PACKAGE_FILE, nodes, entry_name(planned.name), checked_on=device)
        try:
            package_aoti(str(folder / PACKAGE_FILE), files)
        except RuntimeError as error:  # torch's own writer does not say OSError
            raise BundleError(MSG_NOT_PACKED.format(problem=str(error).splitlines()[0].rstrip("."))) from error
    tensors = {
        name: tensor
        for planned in graphs
        for name, tensor in zip(planned.variant.weights, planned.weights, strict=True)
    }
    with (folder / m.WEIGHTS_FILE).open("xb") as file:
        write_weights(tensors, WeightsFile(file), folder / INDEX_FILE)
    check_package(folder / PACKAGE_FILE, files)
    return written


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Check the package of `graph` in the bundle `root` and the index of its weights, and run nothing.

    What its code takes and returns is found out by running it alone.

    Raises:
        BundleError: it is not as the manifest says.
    """
    entries = {its.entry for its in manifest.graphs.values()}
    expected = {entry_name(name) for name in manifest.graphs}
    files = {its.file for its in manifest.graphs.values()}
    if entries != expected or files != {PACKAGE_FILE} or INDEX_FILE not in manifest.files or manifest.weights is None:
        raise BundleError(MSG_LAYOUT.format(root=root, package=PACKAGE_FILE, index=INDEX_FILE))
    check_package(root / PACKAGE_FILE, expected)
    read_index(root / INDEX_FILE, manifest.files[m.WEIGHTS_FILE].size)


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> AotiSession:
    """The graph in AOTInductor's runtime; raise BackendError."""
    return AotiSession(graph, root, device)


def _compiled(planned: PlannedGraph, folder: Path, device: str, options: Mapping[str, object]) -> list[str]:
    settings: dict[str, Any] = {
        **(CPU_OPTIONS if device == "cpu" else {}),
        **TARGETS[str(options.get("target", "native"))],
        "cpp.dynamic_threads": True,  # as many as there are where it runs, not where it is compiled
        # It would put the weights into the code, packed.
        "max_autotune": False,
    }
    try:
        return to_aoti(planned.variant, folder, settings)
    except Exception as error:  # a missing tool, a size that must be fixed, Inductor's own bugs
        problem = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        hint = MSG_DYNAMIC if planned.units else ""
        raise BundleError(MSG_NOT_COMPILED.format(graph=planned.name, problem=problem, hint=hint)) from error


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise ConfigurationError(MSG_NO_COMPILER.format(problem=problem)) from error
