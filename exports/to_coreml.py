"""Variants' exported programs as functions of one Core ML package, which share their weights."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgate_compile._graphs import Variant
from tgate_compile._installed import check_installed
from tgate_compile.passes.copy_graph import copy_graph
from tgate_compile.passes.flat_program import flat_program
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.remove_dead import remove_dead

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoreMLFunction:
    """A variant, and the names of its inputs and outputs, which are letters, digits and underscores."""

    variant: Variant
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def to_coreml(functions: Mapping[str, CoreMLFunction], path: Path, *, target: str, precision: str) -> None:
    """Write `functions` to the package `path`, the first of them its default, for devices from `target` on.

    Shapes are fixed. A scalar input becomes one of shape [1], for Core ML has none; whole numbers have 32 bits. Inputs
    and outputs are float32, whatever `precision` the functions compute in, `"float16"` or `"float32"`.

    Raises:
        ConfigurationError: coremltools is not installed.
        Exception: of any class; coremltools has no common base class of its errors.
    """
    check_installed("coremltools", extra="coreml", what='format="coreml"')
    began = time.perf_counter()
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as home:
        import coremltools
        from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

        together = MultiFunctionDescriptor()
        for name, function in functions.items():
            package = str(Path(home, f"{name}.mlpackage"))
            program = _program(function.variant)
            taken = zip(function.inputs, program.graph_signature.user_inputs, strict=True)
            nodes = {node.name: node for node in program.graph.nodes}
            model = coremltools.convert(
                program,
                convert_to="mlprogram",
                inputs=[
                    coremltools.TensorType(name=given, dtype=_dtype(nodes[str(own)].meta["val"]))
                    for given, own in taken
                ],
                outputs=[coremltools.TensorType(name=given, dtype=np.float32) for given in function.outputs],
                minimum_deployment_target=coremltools.target[target],
                compute_precision=coremltools.precision[precision.upper()],
                skip_model_load=True,
            )
            model.save(package)
            together.add_function(package, src_function_name="main", target_function_name=name)
        together.default_function_name = next(iter(functions))
        save_multifunction(together, str(path))
    logger.info("converted %d graphs to Core ML in %.1f s", len(functions), time.perf_counter() - began)


def _dtype(tensor: torch.Tensor) -> type:
    """coremltools' default for numbers with a point would be float16."""
    return np.float32 if tensor.is_floating_point() else np.int32


def _program(variant: Variant) -> torch.export.ExportedProgram:
    graph_module = copy_graph(variant.program.graph_module)
    _vectors_for_scalars(graph_module, variant.program.graph_signature.user_inputs)
    if lower_complex(graph_module).changes:
        remove_dead(graph_module)
    graph_module.recompile()
    program: torch.export.ExportedProgram = flat_program(variant.program, graph_module).run_decompositions({})
    return program


def _vectors_for_scalars(graph_module: torch.fx.GraphModule, inputs: Sequence[object]) -> None:
    """Have inputs without dimensions given as ones of shape [1]."""
    for node in list(graph_module.graph.nodes):
        if node.op != "placeholder" or node.name not in inputs or node.meta["val"].ndim:
            continue
        scalar = node.meta["val"]
        with graph_module.graph.inserting_after(node):
            squeezed: Any = graph_module.graph.call_function(torch.ops.aten.squeeze.dim, (node, 0))
        node.replace_all_uses_with(squeezed, delete_user_cb=lambda user, own=squeezed: user is not own)
        squeezed.meta["val"] = scalar
        with scalar.fake_mode:
            node.meta["val"] = torch.empty((1,), dtype=scalar.dtype, device=scalar.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' bars of progress, and its notes on versions that it has not been tested with and on what it
    does without where nothing can be run; and without torch's deprecation when it copies a program."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
