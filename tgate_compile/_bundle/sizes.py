"""Sizes that a bundle leaves free: `2*b`, `16*h*w`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence

#: A number, or an expression of names and numbers with + - * // and brackets.
Size = int | str

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
#: `8*h`: what tells the value of h.
_MULTIPLE = re.compile(r"(?:([1-9][0-9]{0,17})\*)?([a-z][a-z0-9_]*)")

MAX_LENGTH = 200


def size_at(size: Size, values: Mapping[str, int]) -> int:
    """What `size` is for these values of its names.

    Raises:
        ValueError: it is no such expression, or has other names.
    """
    if isinstance(size, int):
        return size
    if len(size) > MAX_LENGTH:
        raise ValueError(f"{size[:20]!r}... is too long for a size")
    try:
        return _evaluate(ast.parse(size, mode="eval").body, values)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{size!r} is no size") from error


def shape_at(shape: Sequence[Size], values: Mapping[str, int]) -> tuple[int, ...]:
    """Each of `shape` at these values.

    Raises:
        ValueError: as `size_at`.
    """
    return tuple(size_at(size, values) for size in shape)


def solve(expected: Sequence[Sequence[Size]], given: Sequence[Sequence[int]]) -> dict[str, int] | None:
    """The values of all names for which the shapes `expected` are those that are `given`; None if there are none.

    Each name must be known from a multiple of it, `8*h`, as it is from the latents' shape.
    """
    if len(expected) != len(given) or any(len(a) != len(b) for a, b in zip(expected, given, strict=False)):
        return None
    pairs = [pair for a, b in zip(expected, given, strict=True) for pair in zip(a, b, strict=True)]
    values: dict[str, int] = {}
    for size, number in pairs:
        multiple = _MULTIPLE.fullmatch(size) if isinstance(size, str) else None
        if multiple is not None:
            value, rest = divmod(number, int(multiple[1] or 1))
            if rest or value < 1 or values.setdefault(multiple[2], value) != value:
                return None
    try:
        return values if all(size_at(size, values) == number for size, number in pairs) else None
    except ValueError:
        return None


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values)
    raise ValueError(f"{ast.unparse(node)[:MAX_LENGTH]!r} is no size, or has a name without a value")
