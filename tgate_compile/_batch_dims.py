"""Which dimension of a value inside a denoiser has the rows of the batch, seen by changing some of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from tgate_compile._call import Call
from tgate_compile._errors import UnsupportedModelError
from tgate_compile.passes.operands import outputs_of

aten = torch.ops.aten

MSG_ROWS = (
    "{output} does not have the rows of the batch in its first dimension, each following its own row of the inputs "
    "alone, so that the guidance halves cannot be told apart. Put the batch first, let no row depend on another, and "
    "return nothing that belongs to no row."
)


MSG_TRAINING = (
    "The denoiser is in training mode, and its dropout makes each run another. Call its eval() before the pipeline."
)


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
            raise UnsupportedModelError(MSG_TRAINING)
        if self._batch % 2:
            return dict.fromkeys(nodes, 0)  # there are no halves, and nothing is merged
        outputs = outputs_of(self._graph)
        watched = {*nodes, *outputs}
        before, after = (self._values(watched, changed=changed) for changed in (False, True))
        dims = {node: _dim_of_change(before[node], after[node]) for node in watched}
        for i, node in enumerate(outputs):
            if dims[node] != 0:
                output = "What forward() returns" if len(outputs) == 1 else f"Value {i} of what forward() returns"
                raise UnsupportedModelError(MSG_ROWS.format(output=output))
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
