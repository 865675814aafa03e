"""A planned graph as an ONNX file, whose weights are in the shared file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._bundle.manifest import WEIGHTS_FILE
from tgate_compile._bundle.planned_graphs import PlannedGraph
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._errors import BundleError
from tgate_compile.exports.to_onnx import to_onnx

if TYPE_CHECKING:
    import onnx_ir

MSG_NOT_CONVERTED = "The {graph} graph cannot be converted to ONNX: {problem}."


def write_graph(planned: PlannedGraph, path: Path, weights: WeightsFile) -> int:
    """Write the graph to `path` and what is new of its weights to `weights`; tell the number of its operators.

    Raises:
        BundleError: the graph cannot be converted.
    """
    import onnx_ir

    try:
        graph = to_onnx(planned.variant)
    except Exception as error:  # torch.onnx raises whatever its converters raise
        raise BundleError(MSG_NOT_CONVERTED.format(graph=planned.name, problem=_cause(error))) from error
    model = graph.model
    for value, name in zip(model.graph.inputs, planned.input_names, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, planned.output_names, strict=True):
        value.name = name
    model.graph.name = planned.name
    live = dict(zip(planned.variant.weights, planned.weights, strict=True))
    for name in graph.weights:
        _move_out(model.graph.initializers[name], live[name], weights)
    proto = onnx_ir.to_proto(model)
    proto.graph.ClearField("value_info")  # shapes inside of the graph follow from those of its inputs
    path.write_bytes(proto.SerializeToString())
    return sum(1 for _ in model.graph.all_nodes())


def _cause(error: BaseException) -> str:
    """The first line of what `error` goes back to: torch.onnx wraps it in general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def _move_out(value: onnx_ir.Value, tensor: torch.Tensor, weights: WeightsFile) -> None:
    import onnx_ir

    given = value.const_value
    assert given is not None
    assert isinstance(given.shape, onnx_ir.Shape)
    offset, length = weights.add(tensor)
    assert length == given.nbytes
    location = Path(WEIGHTS_FILE).name
    value.const_value = onnx_ir.ExternalTensor(
        location,
        offset,
        length,
        given.dtype,
        shape=given.shape,
        name=value.name,  # type: ignore[arg-type]
    )
