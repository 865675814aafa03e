"""Write ONNX files whose weights are in the bundle's file, quantized or not."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tgate_compile._errors import BundleError, first_line
from tgate_compile.bundle.calibration import Quantizing
from tgate_compile.bundle.manifest import WEIGHTS_FILE
from tgate_compile.bundle.quantization import Quantization
from tgate_compile.bundle.weights import WeightsFile
from tgate_compile.exports.onnx.session import ELEMENT_TYPES

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
    if result.is_graph_output():
        last.name, result.name = result.name, f"{result.name}.replaced"  # outputs keep their names
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


#: The largest integer for each number of bits. The ranges are symmetric: the smallest integer is not used.
LARGEST = {8: 127, 4: 7}
#: The largest weight that is multiplied as an integer. CPUs without VNNI add two products of weights with activations
#: of up to 255 in 16 bits, which must not overflow.
LARGEST_FACTOR = 63


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight, `values * scales`, with a scale for each channel or for each block of `block` rows.

    Attributes:
        values: the integers, stored as int8 whatever their number of bits, with the weight's shape.
        scales: the scales, in the weight's dtype.
        bits: the number of bits of a value.
        axis: the axis of the channels or, with blocks, the axis along which a block extends.
        block: the number of rows that share a scale, or None if all values of a channel share it.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bits: Literal[4, 8]
    axis: int
    block: int | None

    def dequantized(self) -> torch.Tensor:
        """Return the weight that the integers and scales represent."""
        values = self.values.to(self.scales.dtype)
        if self.block is not None:
            return values * self.scales.repeat_interleave(self.block, dim=self.axis)
        return values * self.scales.view(_along(self.axis, values.ndim))


def quantized_by_channel(weight: torch.Tensor, axis: int, largest: int = LARGEST[8]) -> QuantizedTensor:
    """Quantize `weight` to 8 bits or to integers up to `largest`, with a scale for each channel along `axis`."""
    flat = weight.detach().movedim(axis, 0).flatten(1)  # [channels, all others]
    scales = _scales(flat.abs().amax(1), weight.dtype, largest)
    values = _rounded(weight, scales.view(_along(axis, weight.ndim)), largest)
    return QuantizedTensor(values, scales, 8, axis, None)


def quantized_by_block(weight: torch.Tensor, block: int) -> QuantizedTensor:
    """Quantize `weight`, [inputs, outputs], to 4 bits, with a scale for each `block` of inputs of each output."""
    inputs, outputs = weight.shape
    blocks = weight.detach().reshape(inputs // block, block, outputs)
    scales = _scales(blocks.abs().amax(1), weight.dtype, LARGEST[4])  # [inputs / block, outputs]
    values = _rounded(blocks, scales[:, None], LARGEST[4]).reshape(inputs, outputs)
    return QuantizedTensor(values, scales, 4, 0, block)


def quantize_weights(
    model: onnx_ir.Model, live: Mapping[str, torch.Tensor], quantization: Quantization, weights: WeightsFile
) -> dict[str, torch.Tensor]:
    """Quantize the weights `live` of the convolutions and linear layers in `model`, and add the results to `weights`.

    Equal weights give equal bytes in all graphs. Returns the weights that are not quantized: those that `quantization`
    keeps, vectors, and those that are used by other operators as well.
    """
    left = {}
    order = {node: at for at, node in enumerate(model.graph)}
    for name, tensor in live.items():
        uses = None if quantization.skips(name) else uses_of(model.graph.initializers[name])
        if uses is None or not tensor.is_floating_point():
            left[name] = tensor
            continue
        value = model.graph.initializers.pop(name)
        for use in uses:
            few = _quantized(tensor.detach().t() if use.transposed else tensor.detach(), use, quantization)
            layers = sorted((layer for layer, _ in use.value.uses()), key=order.__getitem__)
            values, scales = _stored(model, name, few, weights)
            if quantization.scheme == "int8-dynamic" and use.linear:
                for layer in layers:
                    multiply_integers(model, layer, values, scales)
                continue
            node = _dequantize(name, few, values, scales)
            model.graph.insert_before(layers[0], node)
            use.value.replace_all_uses_with(node.outputs[0])
        for transposition, _ in value.uses():
            model.graph.remove(transposition, safe=True)
    return left


@dataclass(frozen=True)
class Use:
    """How layers use a weight.

    Attributes:
        value: the weight, or the result of its transposition, which only layers use.
        transposed: whether `value` is transposed.
        axis: the axis of the output channels.
        linear: whether the layers are matrix products with a weight [inputs, outputs].
    """

    value: onnx_ir.Value
    transposed: bool
    axis: int
    linear: bool


def uses_of(weight: onnx_ir.Value) -> list[Use] | None:
    """Return all uses of `weight`, or None if another operator than a layer uses it."""
    found = []
    direct = {_axis(node, index) for node, index in weight.uses() if node.op_type != "Transpose"}
    if direct:
        ((axis, linear),) = direct if len(direct) == 1 else [(None, False)]
        if axis is None:
            return None
        found.append(Use(weight, False, axis, linear))
    for node, _ in weight.uses():
        if node.op_type == "Transpose":
            after = node.outputs[0]
            if {_axis(*use) for use in after.uses()} != {(1, True)} or after.is_graph_output():
                return None
            found.append(Use(after, True, 1, True))
    return found or None


def _axis(node: onnx_ir.Node, index: int) -> tuple[int | None, bool]:
    """Return the axis of the output channels of a weight that `node` uses, and whether it is [inputs, outputs]."""
    if index != 1 or node.domain:
        return None, False
    if node.op_type == "MatMul":
        return 1, True
    if node.op_type == "Gemm":
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return (0, False) if transposed else (1, True)
    return {"Conv": 0}.get(node.op_type), False


def _quantized(weight: torch.Tensor, use: Use, quantization: Quantization) -> QuantizedTensor:
    if quantization.scheme == "int4" and use.linear and weight.shape[0] % quantization.block == 0:
        return quantized_by_block(weight, quantization.block)
    multiplied = quantization.scheme == "int8-dynamic" and use.linear
    return quantized_by_channel(weight, use.axis, LARGEST_FACTOR if multiplied else LARGEST[8])


def _stored(
    model: onnx_ir.Model, name: str, few: QuantizedTensor, weights: WeightsFile
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Add the values and scales of the weight `name` as initializers, and return these."""
    import onnx_ir

    wide = few.bits == 8
    values = few.values if wide else _packed(few.values)
    dtype = onnx_ir.DataType.INT8 if wide else onnx_ir.DataType.INT4
    scale_dtype = onnx_ir.DataType(ELEMENT_TYPES[few.scales.dtype])
    stored = []
    for tensor in (
        external_tensor(f"{name}.int{few.bits}", values, dtype, tuple(few.values.shape), weights),
        external_tensor(f"{name}.scales", few.scales, scale_dtype, tuple(few.scales.shape), weights),
    ):
        kind = onnx_ir.TensorType(tensor.dtype)
        stored.append(onnx_ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor))
        model.graph.register_initializer(stored[-1])
    values_of, scales_of = stored
    return values_of, scales_of


def _dequantize(name: str, few: QuantizedTensor, values: onnx_ir.Value, scales: onnx_ir.Value) -> onnx_ir.Node:
    """Return the operator whose output replaces the weight `name`."""
    import onnx_ir

    attributes = {"axis": few.axis} | ({} if few.block is None else {"block_size": few.block})
    node = onnx_ir.node("DequantizeLinear", [values, scales], attributes)
    node.outputs[0].name = f"{name}.dequantized"
    return node


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Pack two values into a byte, the first in the lower half, as ONNX requires."""
    flat = values.reshape(-1).to(torch.uint8) & 15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _scales(largest: torch.Tensor, dtype: torch.dtype, most: int) -> torch.Tensor:
    """Return nonzero scales that map `largest` to `most`."""
    return (largest.double() / most).clamp_min(torch.finfo(dtype).smallest_normal).to(dtype).contiguous()


def _rounded(weight: torch.Tensor, scales: torch.Tensor, most: int) -> torch.Tensor:
    return (weight.detach().float() / scales.float()).round().clamp(-most, most).to(torch.int8).contiguous()


def _along(axis: int, ndim: int) -> list[int]:
    """Return the shape that broadcasts a vector along `axis`."""
    return [-1 if at == axis else 1 for at in range(ndim)]


#: The operators that compute in 8 bits. Attention and norms do not: their values vary too much for a fixed range.
OPERATORS = ["Conv", "MatMul", "Gemm"]
#: Initializers of at least this size, in bytes, are moved to the weights file.
LARGE = 256


def save_static(
    model: onnx_ir.Model,
    live: Mapping[str, torch.Tensor],
    inputs: Sequence[Sequence[torch.Tensor]],
    quantizing: Quantizing,
    path: Path,
    weights: WeightsFile,
) -> int:
    """Quantize `model`, whose weights are `live`, with ranges measured on `inputs`, and write it to `path`.

    Its weights are added to `weights`. Returns the number of operators. ONNX Runtime's quantizer needs memory for
    several copies of the model.
    """
    import onnx_ir
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    names = [str(value.name) for value in model.graph.inputs]
    kept = [str(layer.name) for name in live if quantizing.quantization.skips(name) for layer in _layers(model, name)]
    home = Path(tempfile.mkdtemp(dir=path.parent.parent))
    try:
        with (home / Path(WEIGHTS_FILE).name).open("xb") as file:
            save_model(model, home / "float.onnx", _transposed(model, live), WeightsFile(file), typed=True)
        with _quiet():
            quantize_static(
                home / "float.onnx",
                home / "quantized.onnx",
                _Reader(names, inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                reduce_range=True,  # of the weights, as with LARGEST_FACTOR
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                nodes_to_exclude=kept,
                use_external_data_format=True,
                calibrate_method=CalibrationMethod.MinMax,
                # Of signed activations, OpenVINO's convolutions make other results on CPUs without VNNI.
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True, "MatMulConstBOnly": True},
            )
        quantized = onnx_ir.load(home / "quantized.onnx")
        for name, value in quantized.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes >= LARGE:
                content = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
                value.const_value = external_tensor(name, content, tensor.dtype, tensor.shape.numpy(), weights)
        quantized.metadata_props.clear()
        save_model(quantized, path, {}, weights)
        return sum(1 for _ in quantized.graph.all_nodes())
    finally:
        shutil.rmtree(home)


def _layers(model: onnx_ir.Model, weight: str) -> Iterator[onnx_ir.Node]:
    """Yield the layers that use a weight, directly or transposed."""
    for use in uses_of(model.graph.initializers[weight]) or ():
        yield from (node for node, _ in use.value.uses())


def _transposed(model: onnx_ir.Model, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the transpositions of weights from `model`, because only initializers are quantized.

    Returns `live` with these weights transposed.
    """
    import onnx_ir

    weights = dict(live)
    for name, tensor in live.items():
        value = model.graph.initializers[name]
        uses = uses_of(value) or []
        if len(uses) == 1 and uses[0].transposed:
            (transposition,) = (node for node, _ in value.uses())
            transposition.outputs[0].replace_all_uses_with(value)
            model.graph.remove(transposition, safe=True)
            weights[name] = tensor.detach().t().contiguous()
            value.const_value = onnx_ir.tensor(weights[name].numpy(), name=name)
            value.shape = onnx_ir.Shape(tuple(weights[name].shape))
    return weights


class _Reader:
    """A reader that passes recorded inputs to the calibration, one call at a time."""

    def __init__(self, names: Sequence[str], inputs: Sequence[Sequence[torch.Tensor]]) -> None:
        self._calls = iter(inputs)
        self._names = names

    def get_next(self) -> dict[str, Any] | None:
        call = next(self._calls, None)
        return None if call is None else {n: tensor.numpy() for n, tensor in zip(self._names, call, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the root logger, on which the quantizer advises preprocessing that has already been done."""
    root = logging.getLogger()
    was = root.disabled
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = was
