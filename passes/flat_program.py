"""Make an exported program again out of a rewritten graph."""

from __future__ import annotations

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

from tgate_compile.passes.operands import outputs_of


def flat_program(source: ExportedProgram, graph_module: torch.fx.GraphModule) -> ExportedProgram:
    """An exported program of `graph_module`: flat tensors in, a flat tuple out, and of `source`'s state what is used.

    Parameters are shared with `source`, never copied.
    """
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
