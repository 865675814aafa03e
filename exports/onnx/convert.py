"""Convert a variant to ONNX, and simplify the result."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tgate_compile._errors import UnsupportedModelError, check_installed
from tgate_compile.passes.editing import copy_graph, flat_program
from tgate_compile.passes.graphs import Variant
from tgate_compile.passes.legalize import expand_masks, promote_concatenated
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    import onnx_ir

#: Of the public rewrite rules, those that diffusers' models give work to. `slice_split_rule` is not among them: it
#: looks at the whole graph once for each node, which for an SDXL's UNet takes longer than all the rest.
RULES = (
    "mul_by_1_rule",
    "add_0_rule",
    "sub_0_rule",
    "div_by_1_rule",
    "dropout_zero_rule",
    "dropout_inference_rule",
    "one_reshape_matmul_reshape_rule",
    "two_reshapes_matmul_reshape_rule",
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "flatten_to_reshape_rule",
    "reshape_reshape_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "squeeze_reshape_1d_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
)
#: As often as onnxscript's own optimizer does it, at most: one simplification makes room for another.
ROUNDS = 2


def optimize_onnx(model: onnx_ir.Model) -> None:
    """Fold constants, simplify, and name operators that opset 23 has; `model` is changed in place."""
    import onnx_ir.passes.common as common
    from onnx_ir.passes import Sequential
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.onnx_fusions import fuse
    from onnxscript.rewriter.rules import common as rules

    simplify = Sequential(
        RewritePass([getattr(rules, name) for name in RULES]),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
    )
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = fold_constants_ir(model)
        if not simplify(model).modified and not folded.modified:
            break
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    fuse(model)


logger = logging.getLogger(__name__)


#: Has GroupNormalization and Attention as operators of their own: fewer nodes, and faster in ONNX Runtime.
OPSET = 23

#: Its optimizer takes numbers that are closer to 0 than 1e-8 for 0.
SMALL = 1e-7


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX model of an exported program.

    Attributes:
        model: its inputs are the program's, for a variant its inputs and then its caches; so are its outputs. Weights
            are initializers.
        weights: the names of those of the weights that the model uses, in the order in which they were asked for.
    """

    model: onnx_ir.Model
    weights: tuple[str, ...]


def to_onnx(variant: Variant) -> OnnxGraph:
    """`variant` as an ONNX model of opset `OPSET`.

    Raises:
        ConfigurationError: onnx or onnxscript is not installed.
        UnsupportedModelError: the graph multiplies integers.
    """
    check_installed("onnx", "onnxscript")
    for node in variant.program.graph.nodes:
        if node.target is torch.ops.aten._int_mm.default:
            raise UnsupportedModelError(
                f"its layers round their inputs to int8 and multiply integers ({node.target}), as torchao's dynamic "
                "quantization does, and this conversion to ONNX has no operator for that; Int8WeightOnlyConfig's "
                "weights it takes"
            )
    began = time.perf_counter()
    graph_module = copy_graph(variant.program.graph_module)
    expand_masks(graph_module)
    promote_concatenated(graph_module)
    if lower_complex(graph_module).changes:
        remove_dead(graph_module)
    graph_module.recompile()
    graph = program_to_onnx(flat_program(variant.program, graph_module), variant.weights)
    logger.info(
        "converted the %s graph to ONNX: %d nodes, in %.1f s",
        variant.phase.name, len(graph.model.graph), time.perf_counter() - began,
    )  # fmt: skip
    return graph


def program_to_onnx(program: torch.export.ExportedProgram, weights: Sequence[str]) -> OnnxGraph:
    """`program` as an ONNX model of opset `OPSET`, with those of its tensors that `weights` names as they are."""
    with _quiet_exporter(), torch.no_grad():
        onnx_program = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert onnx_program is not None
    model = onnx_program.model
    weights = [name for name in weights if name in model.graph.initializers]
    # As inputs they are nothing that the optimizer could fold: no weight ends up in a constant under another name.
    taken = {name: model.graph.initializers.pop(name) for name in weights}
    small = _small_numbers(model)
    taken.update({str(value.name): value for value in small})
    model.graph.inputs.extend(taken.values())
    optimize_onnx(model)
    del model.graph.inputs[len(model.graph.inputs) - len(taken) :]
    for value, tensor in small.items():
        value.const_value = tensor
    for value in taken.values():
        model.graph.register_initializer(value)
    used = [name for name in weights if taken[name].uses()]
    _without_notes(model)
    return OnnxGraph(model, tuple(used))


def _small_numbers(model: onnx_ir.Model) -> dict[onnx_ir.Value, onnx_ir.TensorProtocol]:
    """Take the constants out that the optimizer would mistake for 0: it drops the epsilon of `x / (y + 1e-15)`."""
    import onnx_ir

    found: dict[onnx_ir.Value, onnx_ir.TensorProtocol] = {}
    for node in list(model.graph):
        if node.op_type != "Constant" or "value" not in node.attributes:
            continue
        tensor = node.attributes["value"].as_tensor()
        if tensor.size != 1 or not tensor.dtype.is_floating_point():
            continue
        if 0.0 < abs(float(tensor.numpy().item())) < SMALL:
            old = node.outputs[0]
            shape = onnx_ir.Shape([1] * len(tensor.shape))
            new = onnx_ir.Value(name=old.name, shape=shape, type=onnx_ir.TensorType(tensor.dtype))
            old.replace_all_uses_with(new)
            model.graph.remove(node)
            found[new] = tensor
    return found


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what torch says of itself: a deprecation when it copies a program, and operators of torchvision's that it
    does without when torchvision is not installed."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            yield
    finally:
        registration.setLevel(level)


def _without_notes(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes (stack traces, names of the exported program): they are most of a small file."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
