"""Convert a variant to ONNX, and simplify the result."""

from __future__ import annotations

import functools
import json
import logging
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from tgate_compile._errors import UnsupportedModelError, check_installed
from tgate_compile.engine.disk import kept, versions_of
from tgate_compile.passes.graphs import Variant, add_call, copy_graph, flat_program, operand, shape_of
from tgate_compile.passes.legalize import expand_masks, promote_concatenated
from tgate_compile.passes.lower_complex import lower_complex
from tgate_compile.passes.specialize import remove_dead

if TYPE_CHECKING:
    import onnx_ir

#: Those of onnxscript's public rewrite rules that apply to models of diffusers. `slice_split_rule` is not among them:
#: it visits the whole graph once per node, which for SDXL's UNet takes longer than all the rest.
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
#: The most rounds of simplification, as in onnxscript's own optimizer: one simplification can enable another.
ROUNDS = 2


def optimize_onnx(model: onnx_ir.Model) -> None:
    """Fold constants, simplify, and fuse nodes into operators of opset 23; `model` is changed in place."""
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
aten = torch.ops.aten


#: This opset has the operators GroupNormalization and Attention: fewer nodes, and faster in ONNX Runtime.
OPSET = 23

#: The PyTorch whose exporter's own functions were found to write the same files as `torch.onnx.export`.
CHECKED_TORCH = "2.13."

#: Constants below this are hidden from the optimizer, which treats numbers closer to 0 than 1e-8 as 0.
SMALL = 1e-7


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX model of an exported program.

    Attributes:
        model: the model. Its inputs and outputs are those of the program (for a variant, caches last), and its weights
            are initializers.
        weights: the names of the requested weights that the model uses, in the order of the request.
    """

    model: onnx_ir.Model
    weights: tuple[str, ...]


def to_onnx(variant: Variant) -> OnnxGraph:
    """Convert `variant` to an ONNX model of opset `OPSET`.

    Raises:
        ConfigurationError: onnx or onnxscript is not installed.
        UnsupportedModelError: the graph multiplies integers, which this conversion does not support.
    """
    check_installed("onnx", "onnxscript")
    for node in variant.program.graph.nodes:
        if node.target is torch.ops.aten._int_mm.default:
            raise UnsupportedModelError(
                f"its layers round their inputs to int8 and multiply integers ({node.target}), as with torchao's "
                "dynamic quantization, which the conversion to ONNX does not support; weights quantized with "
                "Int8WeightOnlyConfig are supported"
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


@dataclass(frozen=True)
class SerializedOnnx:
    """An ONNX model without the values of its weights, as a live backend opens it.

    Attributes:
        data: the serialized model.
        weights: the names of the weights that it uses, in the variant's order.
        inputs: the names of the inputs in the variant's order, caches last.
        outputs: the names of the outputs in the variant's order, caches last.
    """

    data: bytes
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


#: Where a serialized model expects the values of its weights: in a file next to it, or in further inputs at the end.
WeightsIn = Literal["file", "inputs"]


def serialized_onnx(variant: Variant, weights_in: WeightsIn) -> SerializedOnnx:
    """Convert `variant` as `to_onnx` does and serialize it, or read what an earlier process has made of the same graph.

    Raises:
        ConfigurationError, UnsupportedModelError: as `to_onnx`.
    """
    check_installed("onnx", "onnxscript")
    settings = (weights_in, versions_of("onnx", "onnx-ir", "onnxscript"), variant.weights)
    names, _, data = kept(variant, "onnx", settings, lambda: _serialized(to_onnx(variant), weights_in)).partition(b"\n")
    return SerializedOnnx(data, *(tuple(each) for each in json.loads(names)))


def _serialized(graph: OnnxGraph, weights_in: WeightsIn) -> bytes:
    """Return the names of the weights, inputs and outputs as a line of JSON, and the serialized model."""
    import onnx_ir

    model = graph.model
    names = [
        graph.weights,
        *([str(value.name) for value in each] for each in (model.graph.inputs, model.graph.outputs)),
    ]
    for name in graph.weights:
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        assert isinstance(tensor.shape, onnx_ir.Shape)
        if weights_in == "file":  # keeps the model below protobuf's limit of 2 GB
            value.const_value = onnx_ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
            continue
        del model.graph.initializers[name]
        value.const_value = None
        value.shape = tensor.shape
        value.type = onnx_ir.TensorType(tensor.dtype)
        model.graph.inputs.append(value)
    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return json.dumps(names).encode() + b"\n" + data


def program_to_onnx(program: torch.export.ExportedProgram, weights: Sequence[str]) -> OnnxGraph:
    """Convert `program` to an ONNX model of opset `OPSET`, in which the tensors that `weights` names stay unchanged."""
    with _quiet_exporter(), torch.no_grad():
        exported = _exported(program)
    model = exported.model
    weights = [name for name in weights if name in model.graph.initializers]
    # As inputs, weights cannot be folded by the optimizer, so none ends up in a constant under another name.
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


def _exported(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    decomposed = copy_graph(program.graph_module)
    if not torch.__version__.startswith(CHECKED_TORCH) or not _decompose(decomposed):
        exported = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        assert exported is not None
        return exported
    from onnxscript.version_converter import convert_version
    from torch.onnx._internal.exporter import _core, _fx_passes

    with _sizes_may_be_one():
        _fx_passes.insert_type_promotion_nodes(decomposed)
    for node in decomposed.graph.nodes:
        node.meta.setdefault("nn_module_stack", {})  # the exporter warns of nodes without it
    exported = _core._exported_program_to_onnx_program(flat_program(program, decomposed), registry=_operators())
    convert_version(exported.model, OPSET)
    return exported


@functools.cache
def _operators() -> Any:
    """Return the exporter's table of operators; building it parses the source of 500 functions, in half a second."""
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the exporter's decompositions of operators that ONNX has no function for."""
    from torch.onnx._internal.exporter import _decomp

    known = set(_decomp.get_onnx_implemented_overloads(_operators()))
    return _decomp.create_onnx_friendly_decomposition_table(known)


@functools.cache
def _is_composite(target: Any) -> bool:
    """Return whether `run_decompositions`, as the exporter calls it, replaces the operator `target`."""
    from torch._export.utils import _is_cia_op, _is_preservable_cia_op

    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in _decompositions() or (_is_cia_op(target) and not _is_preservable_cia_op(target))


def _decompose(graph_module: torch.fx.GraphModule) -> bool:
    """Replace operators that are made of others; return whether ONNX has functions for all that are left.

    The exporter itself calls `run_decompositions`, which traces the whole graph again and takes most of a conversion's
    time. Only few operators are replaced, and only these are traced here.
    """
    from torch.onnx._internal.exporter import _fx_passes

    _fx_passes.remove_assertion_nodes(graph_module)
    graph = graph_module.graph
    sizes: dict[object, Node] = {}  # the first node of each symbolic size
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        parts = _parts_of(node) if node.op == "call_function" and _is_composite(node.target) else None
        if parts is None:
            continue
        known = dict(zip(parts.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
        for part in parts.nodes:
            value = part.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr in sizes:
                known.setdefault(part, sizes[value.node.expr])
        with graph.inserting_before(node):
            result: Any = graph.graph_copy(parts, val_map=known)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
            continue
        for use in list(node.users):
            assert use.target is operator.getitem, f"{use} takes all results of {node}"
            use.replace_all_uses_with(result[use.args[1]])
    graph.eliminate_dead_code()
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    return all(map(_operators().is_registered, called))


def _parts_of(node: Node) -> torch.fx.Graph | None:
    """Return the graph that computes `node` from its operands.

    Returns None where only the exporter itself can trace: operators that return numbers or have tensors of their own.
    """
    operands = node.all_input_nodes

    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        assert isinstance(node.target, torch._ops.OpOverload)
        return node.target(*map_arg(node.args, given.__getitem__), **map_arg(node.kwargs, given.__getitem__))

    fake_mode = detect_fake_mode(node.meta["val"])
    if fake_mode is None:
        return None
    with _sizes_may_be_one(), fake_mode:
        parts = make_fx(run, decomposition_table=_decompositions())(*(each.meta["val"] for each in operands)).graph
    for numel in parts.find_nodes(op="call_function", target=aten.sym_numel.default):
        with parts.inserting_before(numel):
            numel.replace_all_uses_with(_number_of_elements(parts, operand(numel, 0)))
    return None if parts.find_nodes(op="get_attr") else parts


def _number_of_elements(graph: torch.fx.Graph, tensor: Node) -> Node:
    """Insert the product of the sizes of `tensor`."""

    def times(one: Node, other: Node) -> Node:
        product = graph.call_function(operator.mul, (one, other))
        product.meta["val"] = one.meta["val"] * other.meta["val"]
        return product

    return functools.reduce(
        times, (add_call(graph, aten.sym_size.int, tensor, d) for d in range(len(shape_of(tensor))))
    )


def _sizes_may_be_one() -> Any:
    """Return the context in which the exporter works: one graph then serves sizes of one as well as larger ones."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def _small_numbers(model: onnx_ir.Model) -> dict[onnx_ir.Value, onnx_ir.TensorProtocol]:
    """Remove and return the constants that the optimizer would mistake for 0, like the epsilon in `x / (y + 1e-15)`."""
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
    """Silence torch's own warnings: about a deprecation in its code, and about operators of a missing torchvision."""
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
    """Remove the exporter's metadata (stack traces and original names), which makes up most of a small file."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
