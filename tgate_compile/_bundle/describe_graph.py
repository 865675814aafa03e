"""What the manifest says of one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import InputKind

from tgate_compile._bundle.manifest import CacheInput, CacheOutput, Facts, Graph, Parity, PhaseSpec, TensorSpec
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._schedule import Phase
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.operands import outputs_of


def describe_graph(planned: PlannedGraph, file: str, nodes: int) -> Graph:
    """The graph in `file`, of so many operators; its parity is not measured yet."""
    variant = planned.variant
    program = variant.program
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][len(variant.weights) :]
    inputs = [_spec(name, node) for name, node in zip(planned.input_names, placeholders, strict=True)]
    outputs = [_spec(name, node) for name, node in zip(planned.output_names, outputs_of(program.graph), strict=True)]
    own, returned = len(variant.inputs), len(outputs) - len(variant.emitted)
    parameters = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    macs = count_macs(program.graph)
    return Graph(
        file=file,
        phase=phase_spec(variant.phase),
        inputs=[TensorSpec(**spec) for spec in inputs[:own]],
        cache_inputs=[
            CacheInput(**spec, kind=site.kind, site=site.name)
            for spec, site in zip(inputs[own:], variant.reused, strict=True)
        ],
        outputs=[TensorSpec(**spec) for spec in outputs[:returned]],
        cache_outputs=[
            CacheOutput(**spec, kind=emission.site.kind, site=emission.site.name, merged=emission.merged)
            for spec, emission in zip(outputs[returned:], variant.emitted, strict=True)
        ],
        parity=Parity(relative=0.0, tolerance=0.0, provider="none"),
        facts=Facts(
            nodes=nodes,
            parameters=sum(program.state_dict[str(spec.target)].numel() for spec in parameters),
            macs=macs.layers,
            macs_total=macs.total,
        ),
    )


def phase_spec(phase: Phase) -> PhaseSpec:
    """`phase` as plain data."""
    return PhaseSpec(guided=phase.guided, reuse=sorted(phase.reuse), emit=sorted(phase.emit), merge=sorted(phase.merge))


def phase_of(spec: PhaseSpec) -> Phase:
    """And back."""
    return Phase(spec.guided, emit=frozenset(spec.emit), merge=frozenset(spec.merge), reuse=frozenset(spec.reuse))


def _spec(name: str, node: torch.fx.Node) -> dict[str, Any]:
    value: torch.Tensor = node.meta["val"]
    return {"name": name, "dtype": dtype_name(value.dtype), "shape": [int(size) for size in value.shape]}
