"""Convert variants to the methods of one ExecuTorch program, which share their weights."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tgate_compile._errors import check_installed
from tgate_compile.exports.executorch.quantize import Integers, kept_operators, quiet_executorch, xnnpack_integers
from tgate_compile.passes.editing import copy_graph, flat_program
from tgate_compile.passes.graphs import Variant
from tgate_compile.passes.legalize import contiguous_inputs, unfuse_attention, unfuse_gelu, unfuse_halves, unfuse_norms
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

logger = logging.getLogger(__name__)

#: A node that is not an operator: it selects one of several results.
_NO_OPERATOR = "getitem"


@dataclass(frozen=True)
class ExecuTorchProgram:
    """A program with a method for each variant.

    Attributes:
        manager: the object that writes the file.
        operators: for each method, how often it calls each operator. Each piece that the delegate runs counts as one
            `executorch_call_delegate`.
    """

    manager: ExecutorchProgramManager
    operators: Mapping[str, Counter[str]]

    def count(self, method: str) -> int:
        """Return the number of operator calls when `method` runs."""
        return self.operators[method].total()


def to_executorch(
    variants: Mapping[str, Variant], delegate: str, integers: Mapping[str, Integers] | None = None
) -> ExecuTorchProgram:
    """Convert `variants` to methods with their names, for the delegate `"xnnpack"`, or without one (`"portable"`).

    A method takes its variant's inputs and then its caches, and returns its outputs, all with fixed shapes. Variants
    with an entry in `integers` are quantized, which only XNNPACK supports.

    Raises:
        ConfigurationError: executorch is not installed.
        Exception: of any class, because ExecuTorch's errors have no common base class.
    """
    check_installed("executorch")
    began = time.perf_counter()
    with quiet_executorch(), torch.no_grad():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        quantized = integers or {}
        programs = {name: _prepared(variant, delegate, quantized.get(name)) for name, variant in variants.items()}
        lowered = to_edge_transform_and_lower(
            programs,
            partitioner={name: [_xnnpack()] for name in programs} if delegate == "xnnpack" else None,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        operators = {name: _operators(lowered.exported_program(name).graph) for name in programs}
        manager = lowered.to_executorch()
    for name, called in operators.items():
        shown = ", ".join(f"{count} {operator}" for operator, count in called.most_common())
        logger.info("the method %s calls %s", name, shown)
    logger.info("converted %d graphs to ExecuTorch in %.1f s", len(variants), time.perf_counter() - began)
    return ExecuTorchProgram(manager, operators)


def _prepared(variant: Variant, delegate: str, integers: Integers | None) -> torch.export.ExportedProgram:
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    graph_module = copy_graph(variant.program.graph_module)
    contiguous_inputs(graph_module, variant.program.graph_signature.user_inputs)
    lower_complex(graph_module)
    if delegate == "xnnpack":
        # XNNPACK supports matrix products and arithmetic. A norm that runs elsewhere splits a graph into two pieces.
        unfuse_attention(graph_module)
        unfuse_gelu(graph_module)
        unfuse_norms(graph_module)
        unfuse_halves(graph_module)
    remove_dead(graph_module)
    graph_module.recompile()
    program = flat_program(variant.program, graph_module)
    kept: set[object] = set()
    if integers is not None:
        program, kept = xnnpack_integers(program, integers), kept_operators()
    # Also folds scalar constants, which ExecuTorch would otherwise create again in each call.
    folded: torch.export.ExportedProgram = constant_prop_pass(program, custom_skip_targets=kept)
    return folded


def _xnnpack() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _operators(graph: torch.fx.Graph) -> Counter[str]:
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    names = (getattr(target, "__name__", str(target)) for target in calls)
    return Counter(name for name in names if name != _NO_OPERATOR)
