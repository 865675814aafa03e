"""The arguments of a denoiser's call: their names, what differs between two calls, and where the batch is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.passes.editing import outputs_of


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the denoiser.

    Attributes:
        leaves: tensors and constants, in pytree order.
        spec: how the leaves make up (args, kwargs).
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(tuple(leaf.detach() if torch.is_tensor(leaf) else leaf for leaf in leaves), spec)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) again."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs

    @property
    def key(self) -> Hashable:
        """What a captured graph depends on: structure, shapes, dtypes, devices, and the constants themselves.

        Not strides: a VAE's latents are channels-last, the scheduler's are not, and one graph serves both.
        """
        return (
            self.spec,
            tuple(
                (leaf.shape, leaf.dtype, leaf.device) if torch.is_tensor(leaf) else _constant(leaf)
                for leaf in self.leaves
            ),
        )

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """This call with `function(tensor)` in place of each tensor."""
        return Call(tuple(function(leaf) if torch.is_tensor(leaf) else leaf for leaf in self.leaves), self.spec)


def _constant(leaf: object) -> Hashable:
    # True == 1 == 1.0, but graphs made for them differ.
    return (type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf))


#: Sizes that may differ: by the position of a tensor among a call's leaves, its dimensions.
FreeDims = Mapping[int, tuple[int, ...]]


def fits(key: Any, other: Any, free: FreeDims, only: Collection[int] | None = None) -> bool:
    """Whether calls with these keys (`Call.key`) can have the same graph, whose sizes `free` are left open.

    With `only`, the tensors at other positions do not matter.
    """
    if key[0] != other[0]:
        return False
    for position, (mine, its) in enumerate(zip(key[1], other[1], strict=True)):
        if mine == its or (only is not None and position not in only and _is_tensor(mine) and _is_tensor(its)):
            continue
        dims = _differing(mine, its)
        if dims is None or not set(dims) <= set(free.get(position, ())):
            return False
    return True


def differing_dims(key: Any, other: Any) -> FreeDims:
    """The sizes in which calls with these keys differ, beyond their batch; empty if they differ in anything else."""
    found: dict[int, tuple[int, ...]] = {}
    if key[0] != other[0]:
        return {}
    for position, (mine, its) in enumerate(zip(key[1], other[1], strict=True)):
        dims = () if mine == its else _differing(mine, its)
        if dims is None or 0 in dims:
            return {}
        if dims:
            found[position] = dims
    return found


def _is_tensor(part: Any) -> bool:
    return isinstance(part[0], torch.Size)


def _differing(mine: Any, its: Any) -> tuple[int, ...] | None:
    """The dimensions of two tensors that differ; None if more does, or these are no tensors."""
    if not (_is_tensor(mine) and _is_tensor(its)) or mine[1:] != its[1:] or len(mine[0]) != len(its[0]):
        return None
    return tuple(dim for dim, (a, b) in enumerate(zip(mine[0], its[0], strict=True)) if a != b)


aten = torch.ops.aten


class BatchDims:
    """Runs a captured denoiser twice: on the inputs of `call`, and with the second half of their rows changed.

    The guidance halves of a value are merged and taken apart along the dimension of its batch, which is not always the
    first: `torch.nn.MultiheadAttention` has it second by default. Shapes alone do not tell, since a denoiser may have
    as many tokens as rows.
    """

    def __init__(self, program: ExportedProgram, call: Call, latents: Node) -> None:
        self._program = program
        self._graph = program.graph
        self._call = call
        self._batch: int = call.leaves[program.graph_signature.user_inputs.index(latents.name)].shape[0]

    @torch.no_grad()
    def of(self, nodes: Sequence[Node]) -> Mapping[Node, int]:
        """The dimensions of the batch in the values of `nodes`; those that have no such dimension are left out.

        Raises:
            UnsupportedModelError: what the denoiser returns has none, or not the first.
        """
        if any(node.target is aten.dropout.default and node.args[1] and node.args[2] for node in self._graph.nodes):
            raise UnsupportedModelError(
                "The denoiser is in training mode, and its dropout makes each run another. Call its eval() before "
                "the pipeline."
            )
        if self._batch % 2:
            return dict.fromkeys(nodes, 0)  # there are no halves, and nothing is merged
        outputs = outputs_of(self._graph)
        watched = {*nodes, *outputs}
        before, after = (self._values(watched, changed=changed) for changed in (False, True))
        dims = {node: _dim_of_change(before[node], after[node]) for node in watched}
        for i, node in enumerate(outputs):
            if dims[node] != 0:
                output = "What forward() returns" if len(outputs) == 1 else f"Value {i} of what forward() returns"
                raise UnsupportedModelError(
                    f"{output} does not have the rows of the batch in its first dimension, each following its own "
                    "row of the inputs alone, so that the guidance halves cannot be told apart. Put the batch "
                    "first, let no row depend on another, and return nothing that belongs to no row."
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
    """The dimension in whose second half all changes are; None if there is none, or nothing has changed."""
    changed = (before != after) & ~(before.isnan() & after.isnan())
    for dim, size in enumerate(changed.shape):
        if size % 2 == 0:
            first, second = changed.chunk(2, dim)
            if bool(second.any()) and not bool(first.any()):
                return dim
    return None
