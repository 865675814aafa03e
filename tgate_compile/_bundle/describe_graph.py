"""What the manifest says of one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export.graph_signature import InputKind

from tgate_compile._bundle.manifest import CacheInput, CacheOutput, Facts, Graph, TensorSpec
from tgate_compile._bundle.phases import phase_spec
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.sizes import Size
from tgate_compile._bundle.weights_digest import dtype_name
from tgate_compile._free_sizes import SYMBOLS
from tgate_compile.passes.count_macs import count_macs
from tgate_compile.passes.operands import outputs_of, shape_of

#: Where in the latents' shape each free size is.
LATENTS_DIMENSION: Mapping[str, int] = {SYMBOLS["batch"]: 0, SYMBOLS["height"]: -2, SYMBOLS["width"]: -1}


def describe_graph(planned: PlannedGraph, file: str, entry: str | None, nodes: int) -> Graph:
    """The graph in `file`, of so many operators; its parity is not measured yet."""
    variant = planned.variant
    program = variant.program
    symbols = symbols_of(planned)
    placeholders = inputs_of(planned)
    inputs = [_spec(name, node, symbols) for name, node in zip(planned.input_names, placeholders, strict=True)]
    returns = outputs_of(program.graph)
    outputs = [_spec(name, node, symbols) for name, node in zip(planned.output_names, returns, strict=True)]
    own, returned = len(variant.inputs), len(outputs) - len(variant.emitted)
    parameters = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    macs = count_macs(planned.sized.program.graph)
    return Graph(
        file=file,
        entry=entry,
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
        parity=None,
        facts=Facts(
            nodes=nodes,
            parameters=sum(program.state_dict[str(spec.target)].numel() for spec in parameters),
            macs=macs.layers,
            macs_total=macs.total,
        ),
    )


def inputs_of(planned: PlannedGraph) -> list[torch.fx.Node]:
    """The nodes of the graph's inputs, caches last, weights left out."""
    variant = planned.variant
    return [node for node in variant.program.graph.nodes if node.op == "placeholder"][len(variant.weights) :]


def symbols_of(planned: PlannedGraph) -> dict[sympy.Symbol, str]:
    """The manifest's names for the free sizes of the graph, by torch's symbols, as the latents' shape shows them."""
    latents = inputs_of(planned)[planned.variant.inputs.index(planned.captured.latents)]
    shape = shape_of(latents)
    symbols: dict[sympy.Symbol, str] = {}
    for name in planned.units:
        size = shape[LATENTS_DIMENSION[name]]
        assert isinstance(size, torch.SymInt), f"{name} was left free, and is {size}"
        (symbol,) = size.node.expr.free_symbols
        symbols[symbol] = name
    return symbols


def size_of(size: int | torch.SymInt, symbols: Mapping[sympy.Symbol, str]) -> Size:
    """`size` as the manifest says it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.subs({symbol: sympy.Symbol(name, integer=True) for symbol, name in symbols.items()})
    return int(expression) if expression.is_number else str(expression)


def _spec(name: str, node: torch.fx.Node, symbols: Mapping[sympy.Symbol, str]) -> dict[str, Any]:
    value: torch.Tensor = node.meta["val"]
    return {"name": name, "dtype": dtype_name(value.dtype), "shape": [size_of(size, symbols) for size in value.shape]}
