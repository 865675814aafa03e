"""Compile the graphs of a bundle with AOTInductor, with their weights in a separate file."""

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

from tgate_compile._errors import BundleError, ConfigurationError, first_line
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.formats import Progress, WrittenGraph
from tgate_compile.bundle.plan import PlannedGraph
from tgate_compile.bundle.weights import INDEX_FILE, WeightsFile, order_of, read_index, write_weights
from tgate_compile.engine.backends import check_known_options, one_of
from tgate_compile.exports.inductor.live import CPU_OPTIONS
from tgate_compile.exports.inductor.open import AotiSession, check_package, entry_name
from tgate_compile.passes.graphs import Variant, copy_graph, flat_program

logger = logging.getLogger(__name__)

#: Inductor's options for code without weights. They are passed to the code at loading, under the qualified names.
WITHOUT_WEIGHTS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}


def to_aoti(variant: Variant, folder: Path, options: Mapping[str, Any], *, keep_layout: bool = False) -> list[str]:
    """Compile `variant` into files in `folder`, for `torch._inductor.package.package_aoti`.

    The code takes the variant's inputs and then its caches, as a flat list of contiguous tensors, and returns its
    outputs. It expects contiguous weights, whatever the strides of the variant's weights; or, with `keep_layout`,
    weights in the layout of the variant's, unless these have gaps. `options` are Inductor's.

    Raises:
        Exception: of any class, because Inductor's errors have no common base class.
    """
    began = time.perf_counter()
    program = flat_program(variant.program, copy_graph(variant.program.graph_module))  # Inductor changes its input
    graph_module: Any = program.module(check_guards=False)
    _name_constants(graph_module, program.constants)
    _make_contiguous(graph_module, keep_layout=keep_layout)
    placeholders = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    examples = tuple(fake.contiguous() for fake in placeholders[len(variant.weights) :])
    with _quiet_exporter(), torch.no_grad():
        files: Any = torch._inductor.aot_compile(
            graph_module, examples, options={**WITHOUT_WEIGHTS, **options, "aot_inductor.output_path": str(folder)}
        )
    logger.info("compiled the %s graph in %.1f s", variant.phase.name, time.perf_counter() - began)
    return [str(file) for file in files]


def _name_constants(module: torch.nn.Module, constants: Iterable[str]) -> None:
    """Make constants buffers, so that the code asks for them by these names: Inductor numbers other tensors."""
    for name in constants:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        value = owner.__dict__.get(attribute)
        if isinstance(value, torch.Tensor):
            delattr(owner, attribute)
            owner.register_buffer(attribute, value, persistent=False)


def _make_contiguous(module: torch.nn.Module, *, keep_layout: bool) -> None:
    """Make the weights of `module`, a copy of the user's, contiguous, without copying those that already are.

    With `keep_layout`, only those with gaps, whose layout cannot be described by an order of their dimensions.
    """

    def stays(tensor: torch.Tensor | None) -> bool:
        return tensor is None or tensor.is_contiguous() or (keep_layout and order_of(tensor) is not None)

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not stays(parameter):
                owner._parameters[name] = torch.nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and not stays(buffer):
                owner._buffers[name] = buffer.contiguous()


def keeps_layout(device: str) -> bool:
    """Return whether code for `device` reads weights in the pipeline's own layout.

    On GPUs convolutions are fastest on channels-last weights, and code for contiguous ones would convert them in each
    step. On a CPU, weights are mapped from the file instead, where they are in C order.
    """
    return device != "cpu"


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence torch's own warnings: about a deprecation in its code, and about complex operators that it does not fuse.

    There are few of these, such as the Fourier transforms of FreeU.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*code generation for complex operators.*")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        yield


PACKAGE_FILE = "graphs/graphs.pt2"

#: The targets of the code: the CPU that compiles it, or every CPU of a level (AVX2 and FMA).
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "native": {},
    "x86-64-v3": {"cpp.march": "x86-64-v3", "cpp.simdlen": 256},
}


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for options of `export` that are not valid, or if there is no compiler."""
    check_known_options('format="aoti"', "format_options", options, {"target": one_of(TARGETS)})
    target = str(options.get("target", "native"))
    missing = ", ".join(name for name in TARGETS[target] if name not in torch._inductor.list_options())
    if missing:
        raise ConfigurationError(
            f'format_options["target"]={target!r} needs a newer torch than {torch.__version__}, whose Inductor does '
            f"not have the option {missing}."
        )
    _check_compiler()


def check_load_options(options: Mapping[str, object]) -> None:
    """Raise ConfigurationError for any options of `load`: this format has none."""
    note = "It uses as many threads as torch.set_num_threads() says."
    check_known_options('backend="aoti"', "backend_options", options, {}, note)


def runtime_version() -> str:
    """Return the version of AOTInductor, which is that of torch."""
    return f"AOTInductor {torch.__version__}"


def write_graphs(
    graphs: Sequence[PlannedGraph], folder: Path, options: Mapping[str, object], progress: Progress
) -> dict[str, WrittenGraph]:
    """Write `graphs` to the bundle at `folder`: a package, the weights and their index.

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
        except RuntimeError as error:  # torch's writer does not raise OSError
            raise BundleError(
                f"torch cannot write the package of the compiled graphs: {first_line(error)}. Nothing has been written."
            ) from error
    tensors = {
        name: tensor
        for planned in graphs
        for name, tensor in zip(planned.variant.weights, planned.weights, strict=True)
    }
    with (folder / m.WEIGHTS_FILE).open("xb") as file:
        write_weights(tensors, WeightsFile(file), folder / INDEX_FILE, keep_layout=keeps_layout(device))
    check_package(folder / PACKAGE_FILE, files)
    return written


def check_graph(graph: m.Graph, root: Path, manifest: m.Manifest) -> None:
    """Check the package of `graph` in the bundle at `root` and the index of its weights, without running any code.

    The inputs and outputs of the code cannot be checked without running it.

    Raises:
        BundleError: a file does not agree with the manifest.
    """
    entries = {each.entry for each in manifest.graphs.values()}
    expected = {entry_name(name) for name in manifest.graphs}
    files = {each.file for each in manifest.graphs.values()}
    if entries != expected or files != {PACKAGE_FILE} or INDEX_FILE not in manifest.files or manifest.weights is None:
        raise BundleError(
            f"The graphs of the bundle {root} must be entries of {PACKAGE_FILE} with their own names, and the bundle "
            f"must have an {INDEX_FILE}."
        )
    check_package(root / PACKAGE_FILE, expected)
    read_index(root / INDEX_FILE, manifest.files[m.WEIGHTS_FILE].size)


def open_graph(graph: m.Graph, root: Path, device: torch.device, options: Mapping[str, object]) -> AotiSession:
    """Open the graph in AOTInductor's runtime, or raise BackendError."""
    return AotiSession(graph, root, device)


def _compiled(planned: PlannedGraph, folder: Path, device: str, options: Mapping[str, object]) -> list[str]:
    settings: dict[str, Any] = {
        **(CPU_OPTIONS if device == "cpu" else {}),
        **TARGETS[str(options.get("target", "native"))],
        "cpp.dynamic_threads": True,  # as many threads as the machine has that runs the code
        "max_autotune": False,  # it would pack the weights into the code
    }
    try:
        return to_aoti(planned.variant, folder, settings, keep_layout=keeps_layout(device))
    except Exception as error:  # a missing tool, a size that must be fixed, a bug in Inductor
        problem = first_line(error, named=True)
        hint = "Some code compiles for fixed sizes only: try export(..., dynamic=False)." if planned.units else ""
        raise BundleError(
            f"AOTInductor cannot compile the {planned.name} graph: {problem}. Nothing has been written. On a CPU it "
            f"needs a C++ compiler, on a GPU also Triton and the CUDA toolkit. {hint}"
        ) from error


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        problem = first_line(error)
        raise ConfigurationError(
            f'format="aoti" compiles C++ and needs a compiler such as g++, but none was found ({problem}).'
        ) from error
