"""A variant's exported program as native code, compiled by AOTInductor; its weights stay outside."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tgate_compile._graphs import Variant
from tgate_compile.passes.copy_graph import copy_graph
from tgate_compile.passes.flat_program import flat_program

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
