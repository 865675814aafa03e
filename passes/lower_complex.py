"""Rewrite complex arithmetic as arithmetic on real and imaginary parts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tgate_compile.passes.graphs import PassResult, argument, operand, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _Parts:
    """The real and imaginary parts of a complex value. An imaginary part of None is zero."""

    real: Node
    imaginary: Node | None


#: The replacement of a node: the parts of a complex value, or the node of a real one.
_Lowered = _Parts | Node
_Rule = Callable[["_Lowering", Node], _Lowered]


def lower_complex(graph_module: GraphModule) -> PassResult:
    """Replace complex values by pairs of real ones, and Fourier transforms by products with their matrices.

    This is for runtimes without complex numbers, or with wrong results for them: OpenVINO broadcasts a real factor over
    real and imaginary parts as if these were another dimension. Shapes may be free. A graph is left unchanged if it has
    a complex input or output, or an operator on complex values that has no rule here.
    """
    graph = graph_module.graph
    nodes = [node for node in graph.nodes if _is_complex(node) or any(map(_is_complex, node.all_input_nodes))]
    if not all(map(_has_rule, nodes)):
        return PassResult(0)
    lowering = _Lowering(graph, nodes)
    for node in nodes:
        with graph.inserting_before(node):
            lowered = _RULES[node.target](lowering, node)
        if isinstance(lowered, _Parts):
            lowering.parts[node] = lowered
        else:
            node.replace_all_uses_with(lowered)
    for node in reversed(nodes):
        graph.erase_node(node)
    return PassResult(len(nodes))


def _is_complex(node: Node) -> bool:
    return any(value.is_complex() for value in _tensors(node))


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [each for each in values if isinstance(each, torch.Tensor)]


def _has_rule(node: Node) -> bool:
    pads = node.target in _TRANSFORMS and argument(node, 1, "s" if len(node.args) > 1 else "n") is not None
    return node.target in _RULES and not pads


class _Lowering:
    """Inserts nodes into `graph`, and keeps the parts of the complex nodes lowered so far."""

    def __init__(self, graph: Graph, nodes: Sequence[Node]) -> None:
        self.graph = graph
        self.parts: dict[Node, _Parts] = {}
        self._mode: Any = next((value.fake_mode for node in nodes for value in _tensors(node)), None)  # type: ignore[attr-defined]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of `target`, with the metadata of its result."""
        node = self.graph.call_function(target, args, kwargs)
        with self._mode:
            node.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        return node

    def of(self, value: object) -> _Parts:
        """Return the parts of a node, which may be complex or real."""
        assert isinstance(value, Node)
        return self.parts.get(value) or _Parts(value, None)

    def imaginary(self, parts: _Parts) -> Node:
        """Return the imaginary part as a node, even if it is zero."""
        return self.call(aten.zeros_like.default, parts.real) if parts.imaginary is None else parts.imaginary

    def sum(self, left: Node | None, right: Node | None, operator: Any = aten.add.Tensor) -> Node | None:
        """Return `left` plus or minus `right`, where None means zero."""
        if right is None:
            return left
        if left is None:
            return self.call(aten.neg.default, right) if operator is aten.sub.Tensor else right
        return self.call(operator, left, right)

    def product(self, left: Node | None, right: object) -> Node | None:
        """Return `left` times `right`, where None means zero."""
        return None if left is None or right is None else self.call(aten.mul.Tensor, left, right)

    def size(self, node: Node, dim: int) -> Any:
        """Return the size of the value of `node` in `dim`, as a number or as a node."""
        size = shape_of(node)[dim]
        if isinstance(size, int):
            return size
        known = self.graph.call_function(aten.sym_size.int, (node, dim))
        known.meta["val"] = size
        return known


def _value(node: Node) -> Any:
    return node.meta["val"]


def _each(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower an operator that does the same to both parts."""
    parts = lowering.of(node.args[0])
    # A view of a complex tensor may not be a view of its parts.
    target = aten.reshape.default if node.target is aten.view.default else node.target
    real, imaginary = (
        None if part is None else lowering.call(target, part, *node.args[1:], **node.kwargs)
        for part in (parts.real, parts.imaginary)
    )
    assert real is not None
    return _Parts(real, imaginary)


def _each_unchanged(lowering: _Lowering, node: Node) -> _Lowered:
    return lowering.of(node.args[0])


def _shifted(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower `fftshift` and its inverse to `roll` by half the size, which runtimes have."""
    given = argument(node, 1, "dim")
    dims = list(range(len(shape_of(node)))) if given is None else [given] if isinstance(given, int) else given
    sizes = [shape_of(node)[dim] for dim in cast("list[int]", dims)]
    if not all(isinstance(size, int) for size in sizes):
        return _each(lowering, node)
    back = node.target is aten.fft_ifftshift.default
    shifts = [(size + 1) // 2 if back else size // 2 for size in sizes]
    parts = lowering.of(node.args[0])
    imaginary = None if parts.imaginary is None else lowering.call(aten.roll.default, parts.imaginary, shifts, dims)
    return _Parts(lowering.call(aten.roll.default, parts.real, shifts, dims), imaginary)


def _on_real(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower an operator that reads the shape."""
    return lowering.call(node.target, lowering.of(node.args[0]).real, *node.args[1:])


def _cast(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower a cast to another complex dtype, or to a real dtype, which drops the imaginary part."""
    value, parts = node.meta["val"], lowering.of(node.args[0])
    if not value.is_complex():
        return lowering.call(aten.to.dtype, parts.real, value.dtype)
    dtype = value.dtype.to_real()
    imaginary = None if parts.imaginary is None else lowering.call(aten.to.dtype, parts.imaginary, dtype)
    return _Parts(lowering.call(aten.to.dtype, parts.real, dtype), imaginary)


def _concatenated(lowering: _Lowering, node: Node) -> _Lowered:
    parts = [lowering.of(each) for each in cast("list[Node]", node.args[0])]
    reals = [part.real for part in parts]
    imaginaries = [lowering.imaginary(part) for part in parts]
    return _Parts(*(lowering.call(node.target, each, *node.args[1:], **node.kwargs) for each in (reals, imaginaries)))


def _added(lowering: _Lowering, node: Node) -> _Lowered:
    left, right = lowering.of(node.args[0]), node.args[1]
    alpha = node.kwargs.get("alpha", 1)
    if isinstance(right, Node):
        other = lowering.of(right)
        real, imaginary = other.real, other.imaginary
        if alpha != 1:
            real, imaginary = cast(Node, lowering.product(real, alpha)), lowering.product(imaginary, alpha)
        sums = (lowering.sum(left.real, real, node.target), lowering.sum(left.imaginary, imaginary, node.target))
        return _broadcast(lowering, node, *sums)
    number = complex(cast(complex, right)) * complex(cast(complex, alpha))
    real = lowering.call(node.target, left.real, number.real)
    imaginary = left.imaginary
    if number.imag:
        imaginary = lowering.call(node.target, lowering.imaginary(left), number.imag)
    return _Parts(real, imaginary)


def _multiplied(lowering: _Lowering, node: Node) -> _Lowered:
    return _product(lowering, node, lowering.of(node.args[0]), node.args[1])


def _product(lowering: _Lowering, node: Node, left: _Parts, right: object) -> _Lowered:
    if isinstance(right, Node):
        other = lowering.of(right)
        factors: tuple[Any, Any] = other.real, other.imaginary
    else:
        number = complex(cast(complex, right))
        factors = number.real, number.imag or None
    real = lowering.sum(
        lowering.product(left.real, factors[0]), lowering.product(left.imaginary, factors[1]), aten.sub.Tensor
    )
    imaginary = lowering.sum(lowering.product(left.real, factors[1]), lowering.product(left.imaginary, factors[0]))
    return _broadcast(lowering, node, real, imaginary)


def _broadcast(lowering: _Lowering, node: Node, real: Node | None, imaginary: Node | None) -> _Parts:
    """Return the parts of `node`, each broadcast to its shape: a part from a single operand may be smaller."""
    assert real is not None
    shape = shape_of(node)
    if shape_of(real) != shape and imaginary is not None:
        real = lowering.call(aten.add.Tensor, real, lowering.call(aten.zeros_like.default, imaginary))
    if imaginary is not None and shape_of(imaginary) != shape:
        imaginary = lowering.call(aten.add.Tensor, imaginary, lowering.call(aten.zeros_like.default, real))
    return _Parts(real, imaginary)


def _divided(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower a division; by a complex value, it is a product with the conjugate over the square of the magnitude."""
    left, right = lowering.of(node.args[0]), node.args[1]
    if not isinstance(right, Node):
        return _product(lowering, node, left, 1 / complex(cast(complex, right)))
    divisor = lowering.of(right)
    if divisor.imaginary is not None:
        square = _squares(lowering, divisor)
        conjugate = _Parts(divisor.real, lowering.call(aten.neg.default, divisor.imaginary))
        lowering.parts[right], kept = conjugate, divisor
        product = cast(_Parts, _product(lowering, node, left, right))
        lowering.parts[right] = kept
        left, divisor = product, _Parts(square, None)
    quotients = [
        None if part is None else lowering.call(aten.div.Tensor, part, divisor.real)
        for part in (left.real, left.imaginary)
    ]
    return _broadcast(lowering, node, *quotients)


def _squares(lowering: _Lowering, parts: _Parts) -> Node:
    squares = lowering.sum(lowering.product(parts.real, parts.real), lowering.product(parts.imaginary, parts.imaginary))
    assert squares is not None
    return squares


def _conjugate(lowering: _Lowering, node: Node) -> _Lowered:
    parts = lowering.of(node.args[0])
    imaginary = None if parts.imaginary is None else lowering.call(aten.neg.default, parts.imaginary)
    return _Parts(parts.real, imaginary)


def _absolute(lowering: _Lowering, node: Node) -> _Lowered:
    return lowering.call(aten.sqrt.default, _squares(lowering, lowering.of(node.args[0])))


def _angle(lowering: _Lowering, node: Node) -> _Lowered:
    parts = lowering.of(node.args[0])
    return lowering.call(aten.atan2.default, lowering.imaginary(parts), parts.real)


def _view_as_real(lowering: _Lowering, node: Node) -> _Lowered:
    parts = lowering.of(node.args[0])
    return lowering.call(aten.stack.default, [parts.real, lowering.imaginary(parts)], -1)


def _view_as_complex(lowering: _Lowering, node: Node) -> _Lowered:
    pairs = operand(node, 0)
    return _Parts(*(lowering.call(aten.select.int, pairs, -1, position) for position in (0, 1)))


def _of_parts(lowering: _Lowering, node: Node) -> _Lowered:
    return _Parts(operand(node, 0), operand(node, 1))


def _polar(lowering: _Lowering, node: Node) -> _Lowered:
    length, angle = operand(node, 0), operand(node, 1)
    parts = (lowering.call(function, angle) for function in (aten.cos.default, aten.sin.default))
    real, imaginary = (lowering.call(aten.mul.Tensor, length, part) for part in parts)
    return _Parts(real, imaginary)


def _real(lowering: _Lowering, node: Node) -> _Lowered:
    return lowering.of(node.args[0]).real


def _imaginary(lowering: _Lowering, node: Node) -> _Lowered:
    return lowering.imaginary(lowering.of(node.args[0]))


def _transformed(lowering: _Lowering, node: Node) -> _Lowered:
    """Lower a discrete Fourier transform over one or several dimensions, without padding."""
    value = lowering.of(node.args[0])
    rank = len(shape_of(node))
    dims: object
    name = str(node.target).split(".")[1]
    if name.endswith("fft"):
        dims = [argument(node, 2, "dim", -1)]
    else:
        dims = argument(node, 2, "dim", [-2, -1] if name.endswith("2") else None)
        dims = list(range(rank)) if dims is None else dims
    sign = 1 if "ifft" in name else -1
    norm = argument(node, 3, "norm") or "backward"
    dtype = node.meta["val"].dtype.to_real()
    if value.real.meta["val"].dtype != dtype:
        value = _Parts(lowering.call(aten.to.dtype, value.real, dtype), value.imaginary)
    for dim in cast("list[int]", dims):
        value = _transformed_over(lowering, value, dim % rank, sign, str(norm))
    return value


def _transformed_over(lowering: _Lowering, value: _Parts, dim: int, sign: int, norm: str) -> _Parts:
    """Return `value` times a matrix of cosines and sines, which become constants if the size is fixed."""
    last = len(shape_of(value.real)) - 1
    count = lowering.size(value.real, dim)
    dtype = value.real.meta["val"].dtype
    device = value.real.meta["val"].device
    # Reduce the products of positions modulo the size, since cosines and sines of large angles are less precise.
    positions = lowering.call(aten.arange.default, count, dtype=torch.int64, device=device)
    rows = lowering.call(aten.unsqueeze.default, positions, 1)
    turns = lowering.call(aten.remainder.Scalar, lowering.call(aten.mul.Tensor, rows, positions), count)
    angles = lowering.call(aten.mul.Tensor, lowering.call(aten.to.dtype, turns, dtype), 2 * math.pi)
    angles = lowering.call(aten.div.Tensor, angles, count)
    cosines, sines = lowering.call(aten.cos.default, angles), lowering.call(aten.sin.default, angles)
    if norm == "ortho" or (norm == "backward") == (sign == 1):
        scale = lowering.call(aten.ones_like.default, cosines)
        scale = lowering.call(aten.div.Tensor, scale, count)
        scale = lowering.call(aten.sqrt.default, scale) if norm == "ortho" else scale
        cosines, sines = (lowering.call(aten.mul.Tensor, each, scale) for each in (cosines, sines))

    def times(part: Node | None, matrix: Node) -> Node | None:
        if part is None:
            return None
        turned = part if dim == last else lowering.call(aten.transpose.int, part, dim, last)
        product = lowering.call(aten.matmul.default, turned, matrix)
        return product if dim == last else lowering.call(aten.transpose.int, product, dim, last)

    forth, back = (aten.add.Tensor, aten.sub.Tensor) if sign == -1 else (aten.sub.Tensor, aten.add.Tensor)
    real = lowering.sum(times(value.real, cosines), times(value.imaginary, sines), forth)
    imaginary = lowering.sum(times(value.imaginary, cosines), times(value.real, sines), back)
    assert real is not None
    return _Parts(real, imaginary)


_TRANSFORMS = {
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_fft2.default,
    aten.fft_ifft2.default,
    aten.fft_fftn.default,
    aten.fft_ifftn.default,
}
_LINEAR = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.neg.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    operator.getitem,
}
_RULES: Mapping[Any, _Rule] = {
    **dict.fromkeys(_TRANSFORMS, _transformed),
    **dict.fromkeys(_LINEAR, _each),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _concatenated),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _added),
    **dict.fromkeys((aten.fft_fftshift.default, aten.fft_ifftshift.default), _shifted),
    aten.mul.Tensor: _multiplied,
    aten.div.Tensor: _divided,
    **dict.fromkeys((aten._conj.default, aten.conj.default, aten.conj_physical.default), _conjugate),
    aten.resolve_conj.default: _each_unchanged,
    aten.resolve_neg.default: _each_unchanged,
    aten.abs.default: _absolute,
    aten.angle.default: _angle,
    aten.real.default: _real,
    aten.imag.default: _imaginary,
    aten.view_as_real.default: _view_as_real,
    aten.view_as_complex.default: _view_as_complex,
    aten.complex.default: _of_parts,
    aten.polar.default: _polar,
    aten.sym_size.int: _on_real,
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), _cast),
}
