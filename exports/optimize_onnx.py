"""Simplify an ONNX model as torch.onnx does, in a time that grows with the model's size, not with its square."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
