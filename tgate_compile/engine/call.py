"""The arguments of a denoiser call: their names, the differences between two calls, and the batch dimension."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.passes.graphs import outputs_of

#: How a graph depends on the values of an input: on all of them, or on whether all are zero.
ByValue = Literal["values", "zero"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the denoiser.

    Attributes:
        leaves: the tensors and constants, in pytree order.
        spec: the pytree structure of (args, kwargs).
        by_value: the positions of the leaves whose values a graph depends on, such as masks, each with the kind of
            dependence.
        image: the rows of the latents that belong to the image, if the others belong to reference images that are
            treated separately: their dimension, the first row, and the row after the last.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    by_value: Mapping[int, ByValue] = field(default_factory=dict)
    image: tuple[int, int, int] | None = None

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_value: Mapping[int, ByValue] = MappingProxyType({})
    ) -> Call:
        """Return the call with these arguments; `by_value` has the ids of those whose values a graph depends on."""
        if "extract" not in kwargs.values():  # a call that fills a cache must get the object itself
            kwargs = {name: _opened(value) for name, value in kwargs.items()}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        positions = {
            i: by_value[id(leaf)] for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and id(leaf) in by_value
        }
        return cls(tuple(leaf.detach() if torch.is_tensor(leaf) else leaf for leaf in leaves), spec, positions)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs)."""
        args, kwargs = self.opened_arguments
        return args, {name: closed(value) for name, value in kwargs.items()}

    @property
    def opened_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs), a pytree in which caches have been replaced with their contents."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs

    @property
    def fills_cache(self) -> bool:
        """Whether the call fills a cache of keys and values, which no graph can do."""
        return any(_is_cache(type(leaf)) for leaf in self.leaves)

    @property
    def key(self) -> Hashable:
        """The properties that a captured graph depends on: structure, shapes, dtypes, devices and constant values.

        Strides are left out: a VAE's latents are channels-last, the scheduler's are not, and one graph serves both.
        """
        return (
            self.spec if self.image is None else (self.spec, self.image),
            tuple(
                (leaf.shape, leaf.dtype, leaf.device, *self._values(position))
                if torch.is_tensor(leaf)
                else _constant(leaf)
                for position, leaf in enumerate(self.leaves)
            ),
        )

    def _values(self, position: int) -> tuple[str, ...]:
        if position not in self.by_value:
            return ()
        leaf: torch.Tensor = self.leaves[position]
        return (repr(bool(leaf.any())) if self.by_value[position] == "zero" else _digest(leaf),)

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """Return this call with each tensor replaced by `function(tensor)`."""
        leaves = tuple(function(leaf) if torch.is_tensor(leaf) else leaf for leaf in self.leaves)
        return replace(self, leaves=leaves)


class _Contents(dict[str, Any]):
    """The attributes of an object that holds tensors. diffusers' caches of keys and values are not pytrees."""

    def __init__(self, kind: type, attributes: Mapping[str, Any]) -> None:
        super().__init__(attributes)
        self.kind = kind


pytree.register_pytree_node(
    _Contents,
    lambda contents: (list(contents.values()), (contents.kind, tuple(contents))),
    lambda values, context: _Contents(context[0], dict(zip(context[1], values, strict=True))),
    flatten_with_keys_fn=lambda contents: (
        [(pytree.MappingKey(name), value) for name, value in contents.items()],
        (contents.kind, tuple(contents)),
    ),
)


def _is_cache(kind: type) -> bool:
    return kind.__module__.startswith("diffusers.") and kind.__name__.endswith(("KVCache", "KVLayerCache"))


def _opened(value: Any) -> Any:
    """Return the contents of a cache of keys and values, unless a call fills it; any other value unchanged."""
    if isinstance(value, list):
        return [_opened(item) for item in value]
    kind = type(value)
    if not _is_cache(kind):
        return value
    attributes = {name: _opened(item) for name, item in vars(value).items()}
    return value if "write" in pytree.tree_leaves(attributes) else _Contents(kind, attributes)


def is_opened(value: Any) -> bool:
    """Return whether there is a `_Contents` in `value`."""
    return isinstance(value, _Contents) or (isinstance(value, list) and any(map(is_opened, value)))


def closed(value: Any) -> Any:
    """Return the object with these contents (`_Contents`); any other value unchanged."""
    if isinstance(value, list):
        return [closed(item) for item in value]
    if not isinstance(value, _Contents):
        return value
    made: Any = object.__new__(value.kind)
    vars(made).update({name: closed(item) for name, item in value.items()})
    return made


def _digest(tensor: torch.Tensor) -> str:
    """Return a hash of the elements of `tensor`."""
    return hashlib.blake2b(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _constant(leaf: object) -> Hashable:
    # True == 1 == 1.0, but the graphs captured for them differ.
    return (type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf))


#: Dimensions whose sizes may vary, by the position of the tensor among the call's leaves.
FreeDims = Mapping[int, tuple[int, ...]]


def fits(key: Any, other: Any, free: FreeDims, only: Collection[int] | None = None) -> bool:
    """Return whether calls with these keys (`Call.key`) can share a graph in which the sizes `free` are dynamic.

    If `only` is given, tensors at other positions are ignored.
    """
    if key[0] != other[0]:
        return False
    for position, (left, right) in enumerate(zip(key[1], other[1], strict=True)):
        is_unused = only is not None and position not in only and _is_tensor(left) and _is_tensor(right)
        if left == right or (is_unused and left[3:] == right[3:]):  # values are part of a graph that does not take them
            continue
        dims = _differing(left, right)
        if dims is None or not set(dims) <= set(free.get(position, ())):
            return False
    return True


def differing_dims(key: Any, other: Any) -> FreeDims:
    """Return the sizes in which calls with these keys differ; empty if anything else, or the batch, differs."""
    found: dict[int, tuple[int, ...]] = {}
    if key[0] != other[0]:
        return {}
    for position, (left, right) in enumerate(zip(key[1], other[1], strict=True)):
        dims = () if left == right else _differing(left, right)
        if dims is None or 0 in dims:
            return {}
        if dims:
            found[position] = dims
    return found


def _is_tensor(part: Any) -> bool:
    return isinstance(part[0], torch.Size)


def _differing(left: Any, right: Any) -> tuple[int, ...] | None:
    """Return the dimensions in which two tensors differ; None if they differ in another way, or are not tensors."""
    if not (_is_tensor(left) and _is_tensor(right)) or left[1:] != right[1:] or len(left[0]) != len(right[0]):
        return None
    return tuple(dim for dim, (a, b) in enumerate(zip(left[0], right[0], strict=True)) if a != b)


aten = torch.ops.aten


class BatchDims:
    """Finds the batch dimension of values in a captured denoiser.

    It runs the graph twice: on the inputs of `call`, and with the second half of their rows changed. The guidance
    halves of a value are merged and split along its batch dimension, which is not always the first:
    `torch.nn.MultiheadAttention` has it second by default. Shapes alone are ambiguous, since a denoiser may have as
    many tokens as rows.
    """

    def __init__(self, program: ExportedProgram, call: Call, latents: Node) -> None:
        self._program = program
        self._graph = program.graph
        self._call = call
        self._batch: int = call.leaves[program.graph_signature.user_inputs.index(latents.name)].shape[0]

    @torch.no_grad()
    def of(self, nodes: Sequence[Node]) -> Mapping[Node, int]:
        """Return the batch dimension of the value of each of `nodes`; values without one are left out.

        Raises:
            UnsupportedModelError: the batch is not the first dimension of every value that the denoiser returns.
        """
        if any(node.target is aten.dropout.default and node.args[1] and node.args[2] for node in self._graph.nodes):
            raise UnsupportedModelError(
                "The denoiser is in training mode, so that its dropout makes every run different. Call its eval() "
                "method before the pipeline."
            )
        if self._batch % 2:
            return dict.fromkeys(nodes, 0)  # without two halves nothing is merged
        outputs = outputs_of(self._graph)
        watched = {*nodes, *outputs}
        before, after = (self._values(watched, changed=changed) for changed in (False, True))
        dims = {node: _dim_of_change(before[node], after[node]) for node in watched}
        for i, node in enumerate(outputs):
            if dims[node] != 0:
                output = "The result of forward()" if len(outputs) == 1 else f"Value {i} of the result of forward()"
                raise UnsupportedModelError(
                    f"{output} does not have the batch in its first dimension, with each row depending only on the "
                    "same row of the inputs, so the guidance halves cannot be separated. Put the batch first, make "
                    "no row depend on another, and return only values that have one entry per row."
                )
        return {node: dim for node in nodes if (dim := dims[node]) is not None}

    def _values(self, watched: Iterable[Node], *, changed: bool) -> dict[Node, torch.Tensor]:
        leaves = iter(self._call.leaves)
        inputs: list[Any] = []
        for spec in self._program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                leaf = next(leaves)
                inputs.append(self._with_other_rows(leaf) if changed else leaf)
            else:
                name = str(spec.target)
                state = self._program.state_dict
                inputs.append(state[name] if name in state else self._program.constants[name])
        recorder = _Recorder(self._program.graph_module, watched)
        recorder.run(*inputs)
        return recorder.values

    def _with_other_rows(self, leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or not leaf.is_floating_point() or leaf.ndim == 0:
            return leaf
        if leaf.shape[0] % self._batch:
            return leaf
        first, second = leaf.chunk(2)
        return torch.cat([first, second * 1.5 + 0.5])


class _Recorder(torch.fx.Interpreter):
    def __init__(self, graph_module: torch.fx.GraphModule, watched: Iterable[Node]) -> None:
        super().__init__(graph_module)
        self._watched = set(watched)
        self.values: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._watched:
            self.values[n] = value
        return value


def _dim_of_change(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """Return the dimension whose second half contains all changes; None if no dimension does or nothing has changed."""
    changed = (before != after) & ~(before.isnan() & after.isnan())
    for dim, size in enumerate(changed.shape):
        if size % 2 == 0:
            first, second = changed.chunk(2, dim)
            if bool(second.any()) and not bool(first.any()):
                return dim
    return None


@contextmanager
def forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the hooked forward with `forward` while the module is traced, so that names have no prefix.

    The module's own torch hooks stay out of the graph; they run before and after it, in each call.
    """
    replaced = {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            if name not in before:
                del module.__dict__[name]
        module.__dict__.update(before)
