"""Quantize graphs for XNNPACK."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from tgate_compile.bundle.quantization import Quantization, Scheme

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import QuantizationConfig


@contextmanager
def quiet_executorch() -> Iterator[None]:
    """Silence deprecation warnings, some of them raised on import, and warnings about experimental interfaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


aten = torch.ops.aten

#: The layers that each scheme quantizes. XNNPACK could also quantize the inputs of convolutions dynamically, but
#: ExecuTorch 1.4 converts these only at the beginning of their piece of the graph.
LAYERS: Mapping[Scheme, tuple[torch._ops.OpOverload, ...]] = {
    "int8-dynamic": (aten.linear.default,),
    "int8-static": (aten.linear.default, aten.conv2d.default),
}

#: The smallest scale. That of ExecuTorch's own quantizer is 2 ** -12, with which weights below 0.03 lose bits.
LEAST_SCALE = 2.0**-30


@dataclass(frozen=True)
class Integers:
    """How a graph is to be quantized.

    Attributes:
        quantization: the scheme, and the layers that are not quantized.
        calls: inputs of the graph in real generations, on which `int8-static` measures ranges.
    """

    quantization: Quantization
    calls: Sequence[Sequence[torch.Tensor]] = ()


def xnnpack_integers(program: ExportedProgram, integers: Integers) -> ExportedProgram:
    """Quantize `program`, whose inputs have fixed sizes, with the operators that XNNPACK recognizes.

    With `int8-dynamic`, the inputs of linear layers are quantized at run time. With `int8-static`, the inputs and
    outputs of linear layers and convolutions are quantized, in the ranges that they had in `integers.calls`. Weights
    are int8, with a scale for each output channel. `program` and its weights are not changed: the quantized weights
    are copies.
    """
    with quiet_executorch(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        module: Any = program.module(check_guards=False)
        # The observers of weights only run with the graph; any inputs will do for them.
        calls = integers.calls or [_zeros(program)]
        prepared = prepare_pt2e(module, _quantizer(integers.quantization))
        for call in calls:
            prepared(*call)
        return torch.export.export(convert_pt2e(prepared), tuple(calls[0]), strict=False)


def kept_operators() -> set[object]:
    """Return the operators that must not be constant-folded, because XNNPACK recognizes integers by them."""
    import executorch.exir  # noqa: F401  # registers the operators

    operators = torch.ops.quantized_decomposed
    return {operators.dequantize_per_channel.default, operators.dequantize_per_tensor.default}


def _quantizer(quantization: Quantization) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    quantizer = XNNPACKQuantizer().set_filter_function(lambda node: _is_taken(node, quantization))
    for layer in LAYERS[quantization.scheme]:
        quantizer.set_operator_type(layer, _configuration(dynamic=quantization.scheme == "int8-dynamic"))
    return quantizer


def _is_taken(node: Node, quantization: Quantization) -> bool:
    """Return whether a layer is quantized; the quantizer also calls this with weights."""
    weight = node if node.op == "get_attr" else node.args[1]
    return isinstance(weight, Node) and weight.op == "get_attr" and not quantization.keeps(str(weight.target))


def _configuration(*, dynamic: bool) -> QuantizationConfig:
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    values = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=(PlaceholderObserver if dynamic else MinMaxObserver).with_args(eps=LEAST_SCALE),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        is_dynamic=dynamic,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=LEAST_SCALE),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(values, None if dynamic else values, weights, None)


def _zeros(program: ExportedProgram) -> list[torch.Tensor]:
    names = program.graph_signature.user_inputs
    fakes = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    return [torch.zeros(fake.shape, dtype=fake.dtype) for fake in fakes]
