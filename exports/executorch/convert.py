"""Convert graphs to ExecuTorch programs, quantized for XNNPACK or not."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from tgate_compile._errors import check_installed
from tgate_compile.bundle.quantization import Quantization, Scheme
from tgate_compile.passes.graphs import Variant, copy_graph, flat_program, operand, outputs_of
from tgate_compile.passes.legalize import contiguous_inputs, unfuse_attention, unfuse_gelu, unfuse_halves, unfuse_norms
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
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
    return isinstance(weight, Node) and weight.op == "get_attr" and not quantization.skips(str(weight.target))


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


logger = logging.getLogger(__name__)

#: A node that is not an operator: it selects one of several results.
_NO_OPERATOR = "getitem"


@dataclass(frozen=True)
class ExecuTorchProgram:
    """A program with a method for each variant.

    Attributes:
        manager: the object that writes the file.
        operators: for each method, how often it calls each operator. Each piece that the delegate runs counts as one
            `executorch_call_delegate`.
    """

    manager: ExecutorchProgramManager
    operators: Mapping[str, Counter[str]]

    def count(self, method: str) -> int:
        """Return the number of operator calls when `method` runs."""
        return self.operators[method].total()


def to_executorch(
    variants: Mapping[str, Variant], delegate: str, integers: Mapping[str, Integers] | None = None
) -> ExecuTorchProgram:
    """Convert `variants` to methods with their names, for the delegate `"xnnpack"`, or without one (`"portable"`).

    A method takes its variant's inputs and then its caches, and returns its outputs, all with fixed shapes. Variants
    with an entry in `integers` are quantized, which only XNNPACK supports.

    Raises:
        ConfigurationError: executorch is not installed.
        Exception: of any class, because ExecuTorch's errors have no common base class.
    """
    check_installed("executorch")
    began = time.perf_counter()
    with quiet_executorch(), torch.no_grad():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        quantized = integers or {}
        programs = {name: _prepared(variant, delegate, quantized.get(name)) for name, variant in variants.items()}
        lowered = to_edge_transform_and_lower(
            programs,
            partitioner={name: [_xnnpack()] for name in programs} if delegate == "xnnpack" else None,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        operators = {name: _operators(lowered.exported_program(name).graph) for name in programs}
        manager = lowered.to_executorch()
    for name, called in operators.items():
        shown = ", ".join(f"{count} {operator}" for operator, count in called.most_common())
        logger.info("the method %s calls %s", name, shown)
    logger.info("converted %d graphs to ExecuTorch in %.1f s", len(variants), time.perf_counter() - began)
    return ExecuTorchProgram(manager, operators)


def _prepared(variant: Variant, delegate: str, integers: Integers | None) -> torch.export.ExportedProgram:
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    graph_module = copy_graph(variant.program.graph_module)
    contiguous_inputs(graph_module, variant.program.graph_signature.user_inputs)
    lower_complex(graph_module)
    if delegate == "xnnpack":
        # XNNPACK supports matrix products and arithmetic. A norm that runs elsewhere splits a graph into two pieces.
        unfuse_attention(graph_module)
        unfuse_gelu(graph_module)
        unfuse_norms(graph_module)
        unfuse_halves(graph_module)
        _return_originals(graph_module)
    remove_dead(graph_module)
    graph_module.recompile()
    program = flat_program(variant.program, graph_module)
    kept: set[object] = set()
    if integers is not None:
        program, kept = xnnpack_integers(program, integers), kept_operators()
    # Also folds scalar constants, which ExecuTorch would otherwise create again in each call.
    folded: torch.export.ExportedProgram = constant_prop_pass(program, custom_skip_targets=kept)
    return folded


def _return_originals(graph_module: torch.fx.GraphModule) -> None:
    """Return values instead of copies of them: a piece of XNNPACK that only copies cannot be converted.

    Graphs return copies in C order, which the outputs of a program have in any case. A value may be returned twice.
    """
    output = graph_module.graph.output_node()
    output.args = (tuple(map(_original, outputs_of(graph_module.graph))),)


def _original(value: Node) -> Node:
    """Return the value that `value` is a copy of, unless it is none, or that of an input."""
    is_copy = value.target is torch.ops.aten.clone.default and operand(value, 0).op == "call_function"
    return operand(value, 0) if is_copy else value


def _xnnpack() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _operators(graph: torch.fx.Graph) -> Counter[str]:
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    names = (getattr(target, "__name__", str(target)) for target in calls)
    return Counter(name for name in names if name != _NO_OPERATOR)
