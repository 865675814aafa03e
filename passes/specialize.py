"""Make the graph of one phase out of a captured denoiser: the driver of the passes."""

from __future__ import annotations

import logging

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from tgate_compile._graphs import Captured, Emission, Variant
from tgate_compile._schedule import Phase
from tgate_compile.passes._result import PassResult
from tgate_compile.passes.copy_graph import copy_graph
from tgate_compile.passes.emit import emit
from tgate_compile.passes.operands import outputs_of
from tgate_compile.passes.remove_dead import remove_dead
from tgate_compile.passes.reuse import cache_name, reuse
from tgate_compile.passes.verify import verify

logger = logging.getLogger(__name__)


def specialize(captured: Captured, phase: Phase, anchor: float = 0.5) -> Variant:
    """The variant of `captured` that serves `phase`; `captured` is left alone.

    Where the phase merges the guidance halves, `anchor` is the weight of the second half.
    The parameters are shared, never copied, and those that nothing uses any more are not part of the result.

    Raises:
        VerificationError: the rewritten graph is not a valid variant.
    """
    graph_module = copy_graph(captured.program.graph_module)
    emitted = (
        *(Emission(site) for site in captured.sites if site.kind in phase.emit),
        *(Emission(site, anchor) for site in captured.sites if site.kind in phase.merge),
    )
    reused = tuple(site for site in captured.sites if site.kind in phase.reuse)

    results: dict[str, PassResult] = {}
    if emitted:
        results["emit"] = emit(graph_module, emitted)
    if reused:
        results["reuse"] = reuse(graph_module, reused)
    results["remove_dead"] = remove_dead(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    logger.debug("specialize(%s): %s", phase.name, {name: result.changes for name, result in results.items()})

    program = _program(captured.program, graph_module)
    taken = program.graph_signature.user_inputs
    caches = {cache_name(site): site for site in reused}
    variant = Variant(
        phase,
        program,
        inputs=tuple(name for name in taken if name not in caches),
        reused=tuple(caches[name] for name in taken if name in caches),
        emitted=emitted,
    )
    verify(variant, captured)
    return variant


def _program(source: ExportedProgram, graph_module: torch.fx.GraphModule) -> ExportedProgram:
    """An exported program of `graph_module`: flat tensors in, a flat tuple out, the state of `source`."""
    specs = {spec.arg.name: spec for spec in source.graph_signature.input_specs}
    inputs = [
        specs.get(node.name) or InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), target=None)
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
    ]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), target=None)
        for node in outputs_of(graph_module.graph)
    ]
    user_inputs = [spec for spec in inputs if spec.kind is InputKind.USER_INPUT]
    used = {spec.target for spec in inputs}
    signature = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((tuple(range(len(user_inputs))), {})),
        out_spec=pytree.tree_structure(tuple(range(len(outputs)))),
        forward_arg_names=[spec.arg.name for spec in user_inputs],
    )
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: tensor for name, tensor in source.state_dict.items() if name in used},
        range_constraints=source.range_constraints,
        module_call_graph=[ModuleCallEntry(fqn="", signature=signature)],
        constants={name: value for name, value in source.constants.items() if name in used},
        verifiers=source.verifiers,
    )
