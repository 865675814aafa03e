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


#: Operators that take nearly all of a step's time. They take operands of the chosen dtype, and sum in float32.
_PRODUCTS = FUSED | {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
}
#: Fused operators that sum in float32, and whose further operands must have the dtype of the first.
_NORMS = {aten.group_norm.default, aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default}
#: Operators for which float16 has too small a range, or bfloat16 too few digits, as in `torch.autocast`.
_SENSITIVE = {
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    aten.exp.default,
    aten.log.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.var.correction,
    aten.var.dim,
    aten.cumsum.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.sin.default,
    aten.cos.default,
    aten.view_as_complex.default,
}
_CASTS = {aten.to.dtype, aten._to_copy.default}
#: Floating-point dtypes that values are computed in, in contrast to those that values are only stored in.
_COMPUTED = frozenset({torch.float32, torch.float16, torch.bfloat16})


#: Weights with at least so many elements are always given in the chosen dtype.
_LARGE = 65_536


def change_precision(
    graph_module: torch.fx.GraphModule, weights: Collection[str], own: torch.dtype, chosen: torch.dtype
) -> tuple[torch.fx.GraphModule, frozenset[str]]:
    """Return a copy of a graph of the dtype `own` that computes in the dtype `chosen`, like a model of that dtype.

    The second result has the names of the weights that the copy takes in `chosen`; the others stay as they are.

    Matrix products, convolutions and norms compute in `chosen`; what is sensitive to rounding, such as the time
    embedding, computes in float32; all other operators take the dtype of their operands. Inputs and outputs have the
    same dtypes as before, and are cast where that is needed.

    Args:
        graph_module: the graph, which is not changed. Its output is one flat tuple.
        weights: the names of the inputs that are weights.
        own: the dtype of the model.
        chosen: the dtype to compute in.
    """
    changed = _Changed(graph_module, weights, own, chosen)
    return changed.result(), frozenset(changed.given)


class _Changed:
    def __init__(
        self, graph_module: torch.fx.GraphModule, weights: Collection[str], own: torch.dtype, chosen: torch.dtype
    ) -> None:
        self._source = graph_module
        self._weights = weights
        self._own = own
        self._chosen = chosen
        self.given: set[str] = set()
        self._graph = Graph()
        self._new: dict[Node, Node] = {}
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}
        self._constant: set[Node] = set()  # nodes that depend on weights alone

    def result(self) -> torch.fx.GraphModule:
        for node in self._source.graph.nodes:
            if node.op == "output":
                old = cast("tuple[Node, ...]", node.args[0])
                self._graph.output(tuple(self._to(self._new[each], each.meta["val"].dtype) for each in old))
            else:
                self._new[node] = self._changed(node)
        result = torch.fx.GraphModule(self._source, self._graph)
        self._graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        result.recompile()
        return result

    def _changed(self, node: Node) -> Node:
        if node.op == "call_function" and node.target in _CASTS and self._is_only_a_cast(node):
            before, after = operand(node, 0).meta["val"].dtype, node.meta["val"].dtype
            value = self._new[operand(node, 0)]
            if before.is_floating_point and after == self._own:
                return self._to(value, self._chosen)
            return self._to(value, after)
        if node.op == "call_function":
            return self._call(node)
        new = self._graph.node_copy(node, lambda old: self._new[old])
        new.meta = dict(node.meta)
        if node.name in self._weights:
            self._constant.add(new)
            if self._is_given_in_chosen(node):
                self.given.add(node.name)
                with node.meta["val"].fake_mode:
                    new.meta["val"] = node.meta["val"].to(self._chosen)
        elif node.op == "placeholder" and _dtype_of(node) == self._own and len(shape_of(node)) > 2:
            return self._to(new, self._chosen)  # latents, text and caches; not timesteps and sizes of images
        return new

    def _is_given_in_chosen(self, weight: Node) -> bool:
        large = weight.meta["val"].numel() >= _LARGE
        return _dtype_of(weight) == self._own and (
            large or all(user.target in _PRODUCTS | _NORMS for user in weight.users)
        )

    def _is_only_a_cast(self, node: Node) -> bool:
        return not node.kwargs or set(node.kwargs) == {"dtype"}

    def _call(self, node: Node) -> Node:
        operands = [self._new[each] for each in node.all_input_nodes]
        dtypes = self._dtypes_for(node, operands)
        chosen = {
            old: self._to(new, dtypes[new]) if new in dtypes else new
            for old, new in zip(node.all_input_nodes, operands, strict=True)
        }
        new = self._graph.node_copy(node, lambda old: chosen[old])
        new.meta = dict(node.meta)
        new.meta["val"] = self._value(new)
        if all(each in self._constant for each in operands):
            self._constant.add(new)
        return new

    def _dtypes_for(self, node: Node, operands: list[Node]) -> dict[Node, torch.dtype]:
        """Return the dtypes that operands of `node` must be cast to; the others stay as they are."""
        floats = [each for each in operands if _dtype_of(each) in _COMPUTED]
        if not floats or _dtype_of(node) not in {self._own, None} | _COMPUTED:
            return {}
        if node.target in _PRODUCTS:
            return dict.fromkeys(floats, self._chosen)
        if node.target in _NORMS:
            return dict.fromkeys(floats, cast(torch.dtype, _dtype_of(floats[0])))
        if node.target in _SENSITIVE:
            return dict.fromkeys(floats, torch.float32)
        given = [each for each in floats if each not in self._constant]
        if given and all(_dtype_of(each) == self._chosen for each in given):
            return dict.fromkeys(floats, self._chosen)  # tables of parameters do not raise the dtype of the values
        return {}

    def _to(self, node: Node, dtype: torch.dtype) -> Node:
        """Return `node` in `dtype`; each value is cast only once."""
        if _dtype_of(node) == dtype:
            return node
        if (node, dtype) not in self._casts:
            new = self._casts[node, dtype] = add_call(self._graph, aten.to.dtype, node, dtype)
            if node in self._constant:
                self._constant.add(new)
        return self._casts[node, dtype]

    def _value(self, node: Node) -> object:
        """Return the fake value of a copied node."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        fakes = torch.utils._pytree.tree_leaves((args, kwargs))
        mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
        if mode is None or not callable(node.target):
            return node.meta["val"]
        with mode:
            return node.target(*args, **kwargs)


def _dtype_of(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
