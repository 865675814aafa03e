"""A linear layer of an ONNX graph as a product of integers, whose values are put into 8 bits as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def multiply_integers(model: onnx_ir.Model, layer: onnx_ir.Node, weight: onnx_ir.Value, scales: onnx_ir.Value) -> None:
    """Have the `MatMul` or `Gemm` `layer` multiply by the int8 `weight`, [inputs, outputs], with `scales`, [outputs].

    Runtimes know these operators by their pattern: ONNX Runtime makes one of them. Layers that take the same value
    share its integers.
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
    """`value` in 8 bits, its scale and its zero, made once."""
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
