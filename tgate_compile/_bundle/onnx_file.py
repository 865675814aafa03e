"""An ONNX model as a file, whose weights are in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._bundle.manifest import WEIGHTS_FILE
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._errors import BundleError

if TYPE_CHECKING:
    import onnx_ir

MSG_INVALID = "The {graph} graph is no valid ONNX model ({problem}). Nothing has been written. Please report this."


def save_model(
    model: onnx_ir.Model, path: Path, live: Mapping[str, torch.Tensor], weights: WeightsFile, *, typed: bool = False
) -> None:
    """Write `model` to `path`, with the tensors `live` for those of its initializers, which go to `weights`.

    `typed`: with what is known of values inside of the graph.
    """
    import onnx_ir

    for name, tensor in live.items():
        _move_out(model.graph.initializers[name], tensor, weights)
    proto = onnx_ir.to_proto(model)
    if not typed:
        proto.graph.ClearField("value_info")  # shapes inside of the graph follow from those of its inputs
    path.write_bytes(proto.SerializeToString())


def check_model(name: str, path: Path) -> None:
    """Raise BundleError unless ONNX's own checker accepts the file at `path`."""
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(MSG_INVALID.format(graph=name, problem=str(error).splitlines()[0])) from error


def external_tensor(
    name: str, content: torch.Tensor, dtype: onnx_ir.DataType, shape: Sequence[int], weights: WeightsFile
) -> onnx_ir.ExternalTensor:
    """The bytes of `content`, which go to `weights`, as a tensor of this dtype and shape."""
    import onnx_ir

    offset, length = weights.add(content)
    return onnx_ir.ExternalTensor(
        Path(WEIGHTS_FILE).name,
        offset,
        length,
        dtype,
        shape=onnx_ir.Shape(shape),
        name=name,
    )


def _move_out(value: onnx_ir.Value, tensor: torch.Tensor, weights: WeightsFile) -> None:
    given = value.const_value
    assert given is not None
    assert tensor.nbytes == given.nbytes
    value.const_value = external_tensor(str(value.name), tensor, given.dtype, given.shape.numpy(), weights)
