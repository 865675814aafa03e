"""Write ONNX files whose weights are in the bundle's weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._errors import BundleError, first_line
from tgate_compile.bundle.manifest import WEIGHTS_FILE
from tgate_compile.bundle.weights import WeightsFile

if TYPE_CHECKING:
    import onnx_ir


def save_model(
    model: onnx_ir.Model, path: Path, live: Mapping[str, torch.Tensor], weights: WeightsFile, *, typed: bool = False
) -> None:
    """Write `model` to `path`, after moving the initializers in `live` to `weights`, with the given values.

    With `typed`, the file keeps the types and shapes of intermediate values.
    """
    import onnx_ir

    for name, tensor in live.items():
        _move_out(model.graph.initializers[name], tensor, weights)
    proto = onnx_ir.to_proto(model)
    if not typed:
        proto.graph.ClearField("value_info")  # intermediate shapes follow from those of the inputs
    path.write_bytes(proto.SerializeToString())


def check_model(name: str, path: Path) -> None:
    """Raise BundleError unless ONNX's own checker accepts the file at `path`."""
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(
            f"The {name} graph is not a valid ONNX model ({first_line(error)}). Nothing has been written. Please "
            "report this."
        ) from error


def external_tensor(
    name: str, content: torch.Tensor, dtype: onnx_ir.DataType, shape: Sequence[int], weights: WeightsFile
) -> onnx_ir.ExternalTensor:
    """Add the bytes of `content` to `weights`, and return them as a tensor of this dtype and shape."""
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


def multiply_integers(model: onnx_ir.Model, layer: onnx_ir.Node, weight: onnx_ir.Value, scales: onnx_ir.Value) -> None:
    """Replace the `MatMul` or `Gemm` `layer` by a product with the int8 `weight`, [inputs, outputs].

    Runtimes recognize the pattern of operators: ONNX Runtime fuses them into one. Layers with the same input share its
    quantized values.

    Args:
        model: the model, which is changed in place.
        layer: the layer to replace.
        weight: the quantized weight, int8, [inputs, outputs].
        scales: the scales of the weight, [outputs].
    """
    import onnx_ir

    taken, result = layer.inputs[0], layer.outputs[0]
    assert taken is not None
    integers, scale, zero = _integers(model, taken)
    assert result.name is not None
    product = onnx_ir.node("MatMulInteger", [integers, weight, zero])
    floats = onnx_ir.node("Cast", product.outputs, {"to": onnx_ir.DataType.FLOAT})
    both = onnx_ir.node("Mul", [scale, scales])
    scaled = onnx_ir.node("Mul", [floats.outputs[0], both.outputs[0]])
    made = [product, floats, both, scaled]
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    if bias is not None:
        made.append(onnx_ir.node("Add", [scaled.outputs[0], bias]))
    for node, what in zip(made, ("product", "floats", "scale", "scaled", "biased"), strict=False):
        node.outputs[0].name = f"{result.name}.{what}"
    last = made[-1].outputs[0]
    last.shape, last.type = result.shape, result.type
    model.graph.insert_before(layer, made)
    result.replace_all_uses_with(last, replace_graph_outputs=True)
    model.graph.remove(layer, safe=True)


def _integers(model: onnx_ir.Model, value: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value]:
    """Return `value` quantized to 8 bits, with its scale and its zero point, reusing an existing operator."""
    import onnx_ir

    for node, _ in value.uses():
        if node.op_type == "DynamicQuantizeLinear":
            integers, scale, zero = node.outputs
            return integers, scale, zero
    node = onnx_ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
    for output, what in zip(node.outputs, ("integers", "scale", "zero"), strict=True):
        output.name = f"{value.name}.{what}"
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    integers, scale, zero = node.outputs
    return integers, scale, zero
