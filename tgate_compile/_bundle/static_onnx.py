"""An ONNX graph whose layers compute in 8 bits, by ONNX Runtime's own quantizer, from values of real generations."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgate_compile._bundle.manifest import WEIGHTS_FILE
from tgate_compile._bundle.onnx_file import external_tensor, save_model
from tgate_compile._bundle.quantized_weights import uses_of
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._quantization import Quantization

if TYPE_CHECKING:
    import onnx_ir

#: What computes in 8 bits. Attention and norms do not: their values have no ranges that hold.
OPERATORS = ["Conv", "MatMul", "Gemm"]
#: Initializers of so many bytes or more go to the weights file.
LARGE = 256


def save_static(
    model: onnx_ir.Model,
    live: Mapping[str, torch.Tensor],
    inputs: Sequence[Sequence[torch.Tensor]],
    quantization: Quantization,
    path: Path,
    weights: WeightsFile,
) -> int:
    """Write `model`, whose weights are `live`, to `path`, with ranges measured on `inputs`; its weights to `weights`.

    Returns the number of operators. ONNX Runtime's quantizer holds the model in memory, several times.
    """
    import onnx_ir
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    names = [str(value.name) for value in model.graph.inputs]
    kept = [str(layer.name) for name in live if quantization.keeps(name) for layer in _layers(model, name)]
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
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                nodes_to_exclude=kept,
                use_external_data_format=True,
                calibrate_method=CalibrationMethod.MinMax,
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
    """The layers that take a weight, as it is or transposed."""
    for use in uses_of(model.graph.initializers[weight]) or ():
        yield from (node for node, _ in use.value.uses())


def _transposed(model: onnx_ir.Model, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`live`, of which those that `model` transposes first are so already: only initializers are quantized."""
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
    """Hands recorded inputs to the calibration, one call after the other."""

    def __init__(self, names: Sequence[str], inputs: Sequence[Sequence[torch.Tensor]]) -> None:
        self._calls = iter(inputs)
        self._names = names

    def get_next(self) -> dict[str, Any] | None:
        call = next(self._calls, None)
        return None if call is None else {n: tensor.numpy() for n, tensor in zip(self._names, call, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice, on the root logger, to do beforehand what has been done here."""
    root = logging.getLogger()
    was = root.disabled
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = was
