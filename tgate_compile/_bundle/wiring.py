"""Which output of which graph may feed which input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tgate_compile._bundle.manifest import Graph, Manifest, Wire
from tgate_compile._errors import BundleError

MSG_WIRE = "The manifest {path} wires {wire}, which is not there, or has another shape or dtype at its other end."
MSG_STEP = "The manifest {path} has a graph {graph!r} in its example, which is none of its graphs."


def wiring_of(graphs: Mapping[str, Graph]) -> list[Wire]:
    """A wire from each value that is handed on to each cache input of the same site, shape and dtype.

    Which of several producers counts is said by the steps: the last one that ran and kept the value.
    """
    return [
        Wire(graph=name, output=output.name, to_graph=to_name, to_input=to_input.name)
        for name, graph in graphs.items()
        for output in graph.cache_outputs
        for to_name, to_graph in graphs.items()
        for to_input in to_graph.cache_inputs
        if (output.kind, output.site, output.shape, output.dtype)
        == (to_input.kind, to_input.site, to_input.shape, to_input.dtype)
    ]


def check_wiring(manifest: Manifest, path: Path) -> None:
    """Raise BundleError if a wire or a step of the manifest at `path` is about what is not there."""
    possible = wiring_of(manifest.graphs)
    for wire in manifest.wiring:
        if wire not in possible:
            shown = f"{wire.graph}.{wire.output} to {wire.to_graph}.{wire.to_input}"
            raise BundleError(MSG_WIRE.format(path=path, wire=shown))
    for step in manifest.example.steps:
        if step.graph not in manifest.graphs:
            raise BundleError(MSG_STEP.format(path=path, graph=step.graph))
