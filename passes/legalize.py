"""Passes for runtimes that have fewer operators than PyTorch: unfuse operators, expand masks, promote dtypes."""

from __future__ import annotations

import math
from collections.abc import Collection
from math import prod
from typing import cast

import torch
from torch.fx import Graph, Node

from tgate_compile.passes.attention_core import FUSED
from tgate_compile.passes.graphs import PassResult, add_call, argument, operand, shape_of


def contiguous_inputs(graph_module: torch.fx.GraphModule, names: Collection[str]) -> PassResult:
    """Mark the inputs `names` as contiguous, for runtimes that require it.

    A call may have been captured with other strides: a pipeline that expands one timestep for all images has strides of
    0, which remain even with one image, where `contiguous` considers them contiguous. Only the metadata of the inputs
    is changed; that of values derived from them is updated when the graph is traced again.
    """
    count = 0
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        fake = node.meta["val"]
        with fake.fake_mode:
            in_order = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        if in_order.stride() != fake.stride():
            node.meta["val"] = in_order
            count += 1
    return PassResult(count)


aten = torch.ops.aten


def expand_masks(graph_module: torch.fx.GraphModule) -> PassResult:
    """Expand the masks of fused attentions that have one row for all queries to [..., queries, keys].

    torch broadcasts such a row. The specification of ONNX's Attention does too, but ONNX Runtime's CPU kernel does not.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None or shape_of(mask)[-2] != 1 or shape_of(operand(node, 0))[-2] == 1:
            continue
        query = operand(node, 0)
        queries = shape_of(query)[-2]
        with graph.inserting_before(node):
            size: Node | int = queries
            if isinstance(queries, torch.SymInt):
                size = graph.call_function(aten.sym_size.int, (query, len(shape_of(query)) - 2))
                size.meta["val"] = queries
            kept = [-1] * (len(shape_of(mask)) - 2)
            expanded = graph.call_function(aten.expand.default, (mask, [*kept, size, -1]))
        fake = mask.meta["val"]
        with fake.fake_mode:
            expanded.meta["val"] = fake.expand([*kept, queries, -1])
        node.replace_input_with(mask, expanded)
        count += 1
    return PassResult(count)


def _mask(node: Node) -> Node | None:
    if node.target not in FUSED:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None


CONCATENATIONS = {aten.cat.default, aten.concat.default, aten.concatenate.default}


def promote_concatenated(graph_module: torch.fx.GraphModule) -> PassResult:
    """Cast the operands of concatenations to the dtype of the result, if they have another one.

    torch promotes them automatically: SDXL joins its pooled text, in float16, with an embedding of sizes, in float32.
    ONNX's Concat does not.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target not in CONCATENATIONS:
            continue
        dtype = node.meta["val"].dtype
        for narrow in node.all_input_nodes:
            fake = narrow.meta["val"]
            if fake.dtype != dtype:
                with graph.inserting_before(node):
                    cast = graph.call_function(aten.to.dtype, (narrow, dtype))
                with fake.fake_mode:
                    cast.meta["val"] = fake.to(dtype)
                node.replace_input_with(narrow, cast)
                count += 1
    return PassResult(count)


def unfuse_attention(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace fused attentions without a mask, or with an additive one, by three-dimensional matrix products.

    torch's own decomposition handles rows that are masked entirely, with operators for which on-device runtimes have
    only slow kernels; a mask of finite numbers has no such rows. Causal attentions, boolean masks, and keys with fewer
    heads than queries are left unchanged. Shapes must be fixed. Views become reshapes, since the result has another
    memory layout.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target in FUSED and _is_plain(node):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_unfused_attention(graph, node))
            graph.erase_node(node)
            count += 1
    views = graph.find_nodes(op="call_function", target=aten.view.default) if count else ()
    for node in views:
        node.target = aten.reshape.default
    return PassResult(count)


def _is_plain(node: Node) -> bool:
    mask = argument(node, 3, "attn_mask")
    query, key, value = (shape_of(operand(node, position)) for position in range(3))
    return (
        (mask is None or (isinstance(mask, Node) and mask.meta["val"].is_floating_point()))
        and not argument(node, 5, "is_causal")
        and query[:-2] == key[:-2] == value[:-2]
    )


def _unfused_attention(graph: Graph, node: Node) -> Node:
    query, key, value = (operand(node, position) for position in range(3))
    *outer, queries, dim = shape_of(query)
    keys, value_dim = shape_of(value)[-2:]
    batch = prod(outer)
    scale, mask = node.kwargs.get("scale"), argument(node, 3, "attn_mask")
    rows = add_call(graph, aten.reshape.default, query, [batch, queries, dim])
    rows = add_call(graph, aten.mul.Tensor, rows, dim**-0.5 if scale is None else scale)
    columns = add_call(graph, aten.reshape.default, key, [batch, keys, dim])
    scores = add_call(graph, aten.bmm.default, rows, add_call(graph, aten.transpose.int, columns, 1, 2))
    if isinstance(mask, Node):
        scores = add_call(graph, aten.reshape.default, scores, [*outer, queries, keys])
        scores = add_call(graph, aten.add.Tensor, scores, mask)
        scores = add_call(graph, aten.reshape.default, scores, [batch, queries, keys])
    weights = add_call(graph, aten.softmax.int, scores, -1)
    values = add_call(graph, aten.reshape.default, value, [batch, keys, value_dim])
    mixed = add_call(graph, aten.bmm.default, weights, values)  # [batch, queries, value_dim]
    return add_call(graph, aten.reshape.default, mixed, [*outer, queries, value_dim])


#: The coefficient in the approximation `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + CUBE * x ** 3)))`.
CUBE = 0.044715


def unfuse_gelu(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace tanh-approximated GELUs in float32 by arithmetic and a tanh.

    ExecuTorch 1.4 passes them to XNNPACK as exact GELUs, which differ by up to 5e-4. XNNPACK has no GELU for other
    dtypes.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target is not aten.gelu.default or node.kwargs.get("approximate", "none") != "tanh":
            continue
        if node.meta["val"].dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_unfused_gelu(graph, operand(node, 0)))
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _unfused_gelu(graph: Graph, value: Node) -> Node:
    square = add_call(graph, aten.mul.Tensor, value, value)
    factor = add_call(graph, aten.add.Tensor, add_call(graph, aten.mul.Tensor, square, CUBE), 1.0)
    argument = add_call(graph, aten.mul.Tensor, add_call(graph, aten.mul.Tensor, value, factor), math.sqrt(2 / math.pi))
    weight = add_call(graph, aten.add.Tensor, add_call(graph, aten.tanh.default, argument), 1.0)
    return add_call(graph, aten.mul.Tensor, add_call(graph, aten.mul.Tensor, value, weight), 0.5)


def unfuse_halves(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace chunks, and means over a first dimension of size 2, by slices and arithmetic.

    They compute the halves of gated linear units, and merge the guidance halves of caches. Shapes must be fixed.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target is aten.chunk.default:
            _slice_chunks(graph, node)
        elif node.target is aten.mean.dim and _is_of_two(node):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_mean(graph, node))
            graph.erase_node(node)
        else:
            continue
        count += 1
    return PassResult(count)


def _slice_chunks(graph: Graph, node: Node) -> None:
    value = operand(node, 0)
    dim = cast(int, argument(node, 2, "dim", 0))
    begin = 0
    for position, chunk in enumerate(node.meta["val"]):
        end = begin + chunk.shape[dim]
        for item in [user for user in node.users if user.args[1] == position]:
            with graph.inserting_before(item):
                item.replace_all_uses_with(add_call(graph, aten.slice.Tensor, value, dim, begin, end))
            graph.erase_node(item)
        begin = end
    graph.erase_node(node)


def _is_of_two(node: Node) -> bool:
    keeps = argument(node, 2, "keepdim", False)
    return shape_of(operand(node, 0))[0] == 2 and argument(node, 1, "dim") == [0] and not keeps


def _mean(graph: Graph, node: Node) -> Node:
    value, dtype = operand(node, 0), node.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = add_call(graph, aten.to.dtype, value, dtype)
    first, second = (add_call(graph, aten.slice.Tensor, value, 0, half, half + 1) for half in (0, 1))
    mean = add_call(graph, aten.mul.Tensor, add_call(graph, aten.add.Tensor, first, second), 0.5)
    return add_call(graph, aten.reshape.default, mean, list(shape_of(node)))


def unfuse_norms(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace group and layer norms in float32, for runtimes that have kernels for products but not for norms.

    A mean becomes a product with a constant row, which sums in the precision of the dtype. Norms in float16 are left
    unchanged, because their kernels sum in float32. Shapes must be fixed.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target not in _UNFUSED or node.meta["val"].dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_UNFUSED[node.target](graph, node))
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _group_norm(graph: Graph, node: Node) -> Node:
    """Replace `group_norm(input, num_groups, weight, bias, eps)`; the input is [batch, channels, *]."""
    value, groups = operand(node, 0), cast(int, node.args[1])
    batch, channels, *rest = shape_of(value)
    normed = _standardized(graph, value, batch * groups, argument(node, 4, "eps", 1e-5))
    weights = (argument(node, 2, "weight"), argument(node, 3, "bias"))
    return _scaled(graph, normed, weights, [1, channels, *[1] * len(rest)])


def _layer_norm(graph: Graph, node: Node) -> Node:
    """Replace `layer_norm(input, normalized_shape, weight, bias, eps)`; the input is [*, *normalized_shape]."""
    value, normalized = operand(node, 0), cast("list[int]", node.args[1])
    rows = prod(shape_of(value)) // prod(normalized)
    normed = _standardized(graph, value, rows, argument(node, 4, "eps", 1e-5))
    return _scaled(graph, normed, (argument(node, 2, "weight"), argument(node, 3, "bias")), list(normalized))


_UNFUSED = {aten.group_norm.default: _group_norm, aten.layer_norm.default: _layer_norm}


def _standardized(graph: Graph, value: Node, rows: int, eps: object) -> Node:
    """Return `value` normalized to mean 0 and variance 1 in each of its `rows` rows."""
    shape = list(shape_of(value))
    dim = prod(shape) // rows
    flat = add_call(graph, aten.reshape.default, value, [rows, dim])
    mean = _constant_row(graph, dim, 1.0 / dim, value)
    centred = add_call(graph, aten.sub.Tensor, flat, add_call(graph, aten.linear.default, flat, mean))
    squares = add_call(graph, aten.mul.Tensor, centred, centred)
    variance = add_call(graph, aten.linear.default, squares, mean)  # [rows, 1]
    factor = add_call(graph, aten.rsqrt.default, add_call(graph, aten.add.Tensor, variance, eps))
    return add_call(graph, aten.reshape.default, add_call(graph, aten.mul.Tensor, centred, factor), shape)


def _constant_row(graph: Graph, size: int, number: float, like: Node) -> Node:
    """Return a constant of shape [1, size]. The caller must fold it, so that it is not computed at run time."""
    fake = like.meta["val"]
    kwargs = {"dtype": fake.dtype, "device": fake.device}
    row = graph.call_function(aten.full.default, ([1, size], number), kwargs)
    with fake.fake_mode:
        row.meta["val"] = aten.full.default([1, size], number, **kwargs)
    return row


def _scaled(graph: Graph, normed: Node, weights: tuple[object, object], shape: list[int]) -> Node:
    """Return `normed` times a weight plus a bias, if they exist, reshaped to `shape`."""
    for weight, target in zip(weights, (aten.mul.Tensor, aten.add.Tensor), strict=True):
        if isinstance(weight, Node):
            normed = add_call(graph, target, normed, add_call(graph, aten.reshape.default, weight, shape))
    return normed
