"""Split a variant by binding time, so that work is not repeated while its inputs stay the same.

Each value of a graph depends on some of the denoiser's inputs:

- the prompt: text, pooled text, sizes and guidance embeddings, which stay the same for a generation;
- the timestep;
- the latents, and everything else that changes from step to step, such as caches and the residuals of a ControlNet.

Work that depends on the prompt alone becomes the *prelude*, which runs once per generation. Work that depends on the
timestep, and possibly on the prompt, becomes the *table*, which returns one row of values per timestep. The rest is the
*step*. All three are variants: plain programs that share the parameters, and that backends and exporters can take.

The values that cross from one part to the next are a minimum cut of the graph, by size in bytes, with these rules:

- Work with parameters that depends on the prompt alone leaves the step, whatever the size of its result.
- Work with parameters that depends on the timestep leaves the step unless its result is larger than its parameters,
  so a value with a row for each token of the latents is not stored.
- Work without parameters (casts, masks, expansions, rotary embeddings) is repeated in the step if its result is larger
  than its inputs. A result is never stored in a form that has been expanded.
- Work on parameters alone stays where its result is used.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from tgate_compile._errors import VerificationError
from tgate_compile.passes.attention_core import LAYOUT
from tgate_compile.passes.graphs import Binding, Variant, argument, flat_program, is_mutable, outputs_of

aten = torch.ops.aten
logger = logging.getLogger(__name__)

#: What a value depends on; empty for parameters, sizes and constants.
Dependences = Mapping[Node, frozenset[Binding]]

_PROMPT: frozenset[Binding] = frozenset({"prompt"})
_TIMESTEP: frozenset[Binding] = frozenset({"timestep"})
_LATENTS: frozenset[Binding] = frozenset({"latents"})
_NOTHING: frozenset[Binding] = frozenset()


@dataclass(frozen=True)
class EarlyVariant(Variant):
    """A part of a variant that runs before the step: its prelude or its table.

    Attributes:
        outputs: the names of the values that it returns, under which later parts take them as inputs.
    """

    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitVariant:
    """A variant split by binding time. Each part takes inputs of the variant and outputs of earlier parts, by name.

    Attributes:
        prelude: the work that depends on the prompt alone; None if there is none.
        table: the work that depends on the timestep, but not on the latents; None if there is none.
        step: the rest, which returns what the variant returns.
    """

    prelude: EarlyVariant | None
    table: EarlyVariant | None
    step: Variant

    @property
    def early(self) -> tuple[EarlyVariant, ...]:
        """The prelude and the table, if they exist."""
        return tuple(part for part in (self.prelude, self.table) if part is not None)

    @property
    def parts(self) -> tuple[Variant, ...]:
        """The prelude and the table, if they exist, and the step."""
        return (*self.early, self.step)

    @property
    def cut(self) -> tuple[str, ...]:
        """The names of the inputs of the step that the prelude or the table returns."""
        returned = {name for part in self.early for name in part.outputs}
        return tuple(name for name in self.step.inputs if name in returned)


def split_by_binding(variant: Variant, roles: Mapping[str, Binding]) -> SplitVariant:
    """Return `variant` split into prelude, table and step. `variant` is not changed; parameters are shared.

    Args:
        variant: the graph of one phase.
        roles: how often the inputs of `variant` change, by name. Caches, and inputs without an entry, change at every
            call.

    Raises:
        VerificationError: the parts are not a valid split.
    """
    graph = variant.program.graph
    dependences = dependences_of(variant.program, roles)
    weights = _Weights(variant.program, dependences)
    crossing = _cheapest_cut(outputs_of(graph), _LATENTS, dependences, weights)
    of_timestep = [node for node in crossing if "timestep" in dependences[node]]
    of_prompt = {node for node in crossing if "timestep" not in dependences[node]}
    of_prompt |= set(_cheapest_cut(of_timestep, _TIMESTEP, dependences, weights, stored=of_prompt))

    in_order = [node for node in graph.nodes if node in of_prompt]
    names = {**_named(in_order, "prelude"), **_named(of_timestep, "table")}
    prelude = _part(variant, names, in_order, {}, roles)
    table = _part(variant, names, of_timestep, {node: names[node] for node in in_order}, roles)
    split = SplitVariant(prelude, table, _step(variant, {node: names[node] for node in crossing}))
    logger.debug(
        "split the %s graph: %d values of the prompt, %d of the timestep",
        variant.phase.name, len(in_order), len(of_timestep),
    )  # fmt: skip
    verify_split(split, variant, roles)
    return split


def dependences_of(program: ExportedProgram, roles: Mapping[str, Binding]) -> Dependences:
    """Return what each value of `program` depends on, given the roles of its inputs by name.

    Sizes are fixed, or the same in all inputs, so a value that only uses the size of an input does not depend on it.
    """
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    found: dict[Node, frozenset[Binding]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            is_input = kinds[node.name] is InputKind.USER_INPUT
            found[node] = frozenset({roles.get(node.name, "latents")}) if is_input else _NOTHING
        elif node.target is aten.sym_size.int:
            found[node] = _NOTHING
        elif _is_random(node):
            found[node] = _LATENTS  # new random numbers at every call
        else:
            found[node] = _NOTHING.union(*(found[source] for source in node.all_input_nodes))
    return found


def _is_random(node: Node) -> bool:
    target = node.target
    if target is aten.dropout.default:
        return node.args[2] is not False
    if target is aten.scaled_dot_product_attention.default:
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


class _Weights:
    """The parameters, buffers and constants that the nodes of a program read, directly or through work on them alone.

    Attributes:
        read: the placeholders of the weights that a node reads.
        parameters: those of them that are parameters.
    """

    def __init__(self, program: ExportedProgram, dependences: Dependences) -> None:
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        self.read: dict[Node, frozenset[Node]] = {}
        self.parameters: set[Node] = set()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                is_weight = kinds[node.name] is not InputKind.USER_INPUT
                self.read[node] = frozenset({node}) if is_weight else frozenset()
                if kinds[node.name] is InputKind.PARAMETER:
                    self.parameters.add(node)
            else:
                sources = [source for source in node.all_input_nodes if not dependences[source]]
                is_size = node.target is aten.sym_size.int
                self.read[node] = frozenset() if is_size else frozenset().union(*(self.read[each] for each in sources))

    def must_leave(self, node: Node, dependences: Dependences) -> bool:
        """Return whether `node` is work with parameters on the prompt alone."""
        return dependences[node] == _PROMPT and not self.parameters.isdisjoint(self.read[node])


#: The unit of the cost of storing a byte. Smaller costs decide between cuts of the same size: few values, contiguous
#: ones (before transpositions), and work done early rather than in every step.
_BYTE = 4096
_VALUE = 64
_OPERATOR = 8
_NEVER = 1 << 62


def _cheapest_cut(
    goals: Sequence[Node],
    late: frozenset[Binding],
    dependences: Dependences,
    weights: _Weights,
    stored: Collection[Node] = (),
) -> list[Node]:
    """Return the values to hand over to the part that computes `goals`, in graph order.

    That part contains all nodes that depend on one of `late`. Each other node is computed in it or before it, whichever
    is cheaper. `stored` values are handed over at no cost.
    """
    nodes = _ancestors(goals)
    is_late = {node: bool(dependences[node] & late) for node in nodes}
    movable = [node for node in nodes if dependences[node] and not is_late[node]]
    kept = frozenset().union(*(weights.read[node] for node in nodes if is_late[node]))  # stay in any case
    network = _Network()
    for node in movable:
        is_input = node.op == "placeholder"
        layout = node.target in LAYOUT
        free = is_input or node in stored
        network.add((node, "computed"), (node, "used"), 0 if free else _cost(node) + _VALUE + layout)
        if weights.must_leave(node, dependences):
            network.add("early", (node, "computed"), _NEVER)
        elif not is_input and not layout:
            network.add("early", (node, "computed"), _OPERATOR)
        for weight in weights.read[node] - kept:
            network.add(weight, (node, "computed"), _NEVER)
        for source in node.all_input_nodes:
            if source in is_late and dependences[source]:
                network.add((source, "used"), (node, "computed"), _NEVER)
        if any(is_late.get(user, False) for user in node.users):
            network.add((node, "used"), "late", _NEVER)
        if node in goals:
            network.add((node, "computed"), "late", _NEVER)
    for weight in frozenset().union(*(weights.read[node] for node in movable)) - kept:
        network.add("early", weight, _cost(weight))
    early = network.source_side("early", "late")
    if early is None:  # a goal is itself work that must leave
        return []
    return [
        node for node in movable
        if node.op != "placeholder" and (node, "computed") in early and (node, "used") not in early
    ]  # fmt: skip


def _ancestors(goals: Iterable[Node], given: Collection[Node] = ()) -> list[Node]:
    """Return `goals` and everything that they are computed from besides the values `given`, in graph order."""
    seen = set(goals)
    queue = list(seen)
    for node in queue:  # grows during the loop
        new = [source for source in node.all_input_nodes if source not in seen and source not in given]
        seen.update(new)
        queue += new
    return [node for node in queue[0].graph.nodes if node in seen] if queue else []


def _cost(node: Node) -> int:
    """Return the cost of storing the value of `node`, which is prohibitive for anything but a tensor."""
    value = node.meta["val"]
    return _nbytes(value) * _BYTE if isinstance(value, torch.Tensor) else _NEVER


def _nbytes(value: torch.Tensor) -> int:
    size = value.dtype.itemsize
    for dim in value.shape:
        # The size for which the graph was captured, if it is free: comparing it would fix it.
        size *= dim if isinstance(dim, int) else int(dim.node.hint or 1)
    return size


class _Network:
    """A flow network. Nodes can be any hashable objects."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._edges: list[list[int]] = []  # the numbers of the edges that leave a node
        self._ends: list[int] = []
        self._left: list[int] = []  # the capacity that is left; edge i ^ 1 is the reverse of edge i

    def add(self, start: Any, end: Any, capacity: int) -> None:
        """Add an edge from `start` to `end`."""
        for source, target, size in ((start, end, capacity), (end, start, 0)):
            self._edges[self._number(source)].append(len(self._ends))
            self._ends.append(self._number(target))
            self._left.append(size)

    def _number(self, node: Any) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self._edges)
            self._edges.append([])
        return self._numbers[node]

    def source_side(self, source: Any, sink: Any) -> set[Any] | None:
        """Return the nodes on the side of `source` in a minimum cut; None if every cut has an edge of cost `_NEVER`.

        This is Dinic's algorithm (1970).
        """
        start, end = self._number(source), self._number(sink)
        while (levels := self._levels(start))[end] >= 0:
            places = [0] * len(self._edges)
            while path := self._path(start, end, levels, places):
                flow = min(self._left[edge] for edge in path)
                if flow >= _NEVER // 2:
                    return None
                for edge in path:
                    self._left[edge] -= flow
                    self._left[edge ^ 1] += flow
        return {node for node, number in self._numbers.items() if levels[number] >= 0}

    def _levels(self, start: int) -> list[int]:
        """Return the distance of each node from `start` over edges with capacity left; -1 if it is not reached."""
        levels = [-1] * len(self._edges)
        levels[start] = 0
        queue = deque([start])
        while queue:
            node = queue.popleft()
            for edge in self._edges[node]:
                if self._left[edge] and levels[self._ends[edge]] < 0:
                    levels[self._ends[edge]] = levels[node] + 1
                    queue.append(self._ends[edge])
        return levels

    def _path(self, start: int, end: int, levels: Sequence[int], places: list[int]) -> list[int]:
        """Return the edges of a shortest path with capacity left; empty if there is none any more."""
        path: list[int] = []
        node = start
        while node != end:
            edges = self._edges[node]
            while places[node] < len(edges):
                edge = edges[places[node]]
                if self._left[edge] and levels[self._ends[edge]] == levels[node] + 1:
                    path.append(edge)
                    node = self._ends[edge]
                    break
                places[node] += 1
            else:
                if not path:
                    return []
                node = self._ends[path.pop() ^ 1]
                places[node] += 1
        return path


def _named(nodes: Iterable[Node], prefix: str) -> dict[Node, str]:
    """Return a name for the value of each of `nodes`: the prefix, and the module that computes it."""
    count: Counter[str] = Counter()
    names: dict[Node, str] = {}
    for node in nodes:
        path, _ = list(node.meta.get("nn_module_stack", {}).values() or [("", "")])[-1]
        # In lower case, since torch.fx changes the names of placeholders that have capital letters ("adaLN").
        name = f"{prefix}_" + (re.sub(r"\W", "_", path) or node.name).lower()
        names[node] = f"{name}_{count[name]}" if count[name] else name
        count[name] += 1
    return names


def _part(
    variant: Variant,
    names: Mapping[Node, str],
    results: Sequence[Node],
    given: Mapping[Node, str],
    roles: Mapping[str, Binding],
) -> EarlyVariant | None:
    """Return the part of `variant` that computes `results`, with the values of `given` as inputs; None if empty."""
    if not results:
        return None
    prefers = [name for name in variant.inputs if roles.get(name, "latents") != "latents"]
    program = _extract(variant, given, results, prefers)
    inputs = tuple(program.graph_signature.user_inputs)
    return EarlyVariant(variant.phase, program, inputs, (), (), tuple(names[node] for node in results))


def _step(variant: Variant, given: Mapping[Node, str]) -> Variant:
    program = _extract(variant, given, outputs_of(variant.program.graph))
    taken = program.graph_signature.user_inputs
    possible = {*variant.inputs, *given.values()}
    inputs = tuple(name for name in taken if name in possible)
    return Variant(variant.phase, program, inputs, variant.reused, variant.emitted)


def _extract(
    variant: Variant, given: Mapping[Node, str], results: Sequence[Node], prefers: Collection[str] = ()
) -> ExportedProgram:
    """Return the program that computes `results` from the inputs of `variant` and the values of `given`.

    The values of `given` are inputs under these names, between the inputs of the denoiser's call and the caches. Sizes
    are read from an input that is used anyway, or one that `prefers` names, if it has them.
    """
    # Only what is needed is copied: a prelude or a table has few of the variant's nodes.
    needed = _ancestors(results, given)
    call, caches = _inputs(variant, set(needed))
    graph = torch.fx.Graph()
    values = {node: graph.node_copy(node) for node in call}  # as operators take them
    for node, name in given.items():
        values[node] = graph.placeholder(name)
        values[node].meta["val"] = node.meta["val"]
    values.update((node, graph.node_copy(node)) for node in caches)
    own = {node: values[node] for node in (*call, *caches)}  # as computed here, even if they are given
    for node in needed:
        if node not in own:
            own[node] = graph.node_copy(node, values.__getitem__)
            values.setdefault(node, own[node])
    graph.output(tuple(own[node] for node in results))
    if prefers:
        _share_sizes(graph, prefers)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    return flat_program(variant.program, _LazyGraphModule(variant.program.graph_module, graph))


def _inputs(variant: Variant, needed: Collection[Node]) -> tuple[list[Node], list[Node]]:
    """Return the inputs of `variant` without its caches, and its caches; weights only if they are `needed`."""
    inputs = variant.program.graph.find_nodes(op="placeholder")
    specs = zip(inputs, variant.program.graph_signature.input_specs, strict=True)
    taken = [node for node, spec in specs if spec.kind is InputKind.USER_INPUT or node in needed]
    first = len(taken) - len(variant.reused)
    return taken[:first], taken[first:]


def _share_sizes(graph: torch.fx.Graph, prefers: Collection[str]) -> None:
    """Read each size from an input whose values are used, or else from one that `prefers` names, if it has that size.

    Otherwise work on the timestep would take the latents, whose batch it needs.
    """
    live = set(_ancestors(outputs_of(graph)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    used = [
        node for node in inputs if any(user in live and user.target is not aten.sym_size.int for user in node.users)
    ]
    sources: dict[str, tuple[Node, int]] = {}
    for node in (*used, *(node for node in inputs if node.name in prefers)):
        value = node.meta["val"]
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                sources.setdefault(str(size.node.expr), (node, dim))  # as a string: comparing it would fix it
    for node in live:
        value = node.meta.get("val")
        if node.target is aten.sym_size.int and isinstance(value, torch.SymInt):
            node.args = sources.get(str(value.node.expr), node.args)


def verify_split(split: SplitVariant, variant: Variant, roles: Mapping[str, Binding]) -> None:
    """Check that `split` is a valid split of `variant`.

    - The inputs of each part are inputs of the variant or outputs of earlier parts, and each output has a use.
    - The prelude depends on the prompt alone, and the table does not depend on the latents.
    - No part but the prelude works with parameters on the prompt alone.
    - The step has no weight that only values of the table need, unless it is no larger than these values.
    - The parts together have the variant's weights, and the step its outputs and caches.
    - Every node has `meta["val"]`, no operator works in place, and no output of an early part is an input.

    Raises:
        VerificationError: the split violates one of these conditions, which the message names.
    """
    known: dict[str, Binding] = {name: roles.get(name, "latents") for name in variant.inputs}
    used = {name for part in split.parts for name in part.inputs}
    for part in split.parts:
        unknown = [name for name in part.inputs if name not in known]
        _require(not unknown, f"a part takes {unknown}, which no earlier part returns")
        for node in part.program.graph.nodes:
            _require(node.op == "output" or "val" in node.meta, f"{node.name} has no meta['val']")
            _require(not is_mutable(node), f"{node.name} works in place")
        dependences = dependences_of(part.program, known)
        weights = _Weights(part.program, dependences)
        if part is not split.prelude:
            left = [node.name for node in part.program.graph.nodes if weights.must_leave(node, dependences)]
            _require(not left, f"work with parameters on the prompt alone is repeated: {left}")
        if not isinstance(part, EarlyVariant):
            _require_no_avoidable_weight(part.program, dependences, weights)
            continue
        binding = _PROMPT if part is split.prelude else _PROMPT | _TIMESTEP
        results = outputs_of(part.program.graph)
        _require(len(set(results)) == len(results) == len(part.outputs), "the outputs of a part are not distinct")
        _require(all(node.op != "placeholder" for node in results), "an output of a part is an input")
        wrong = [name for node, name in zip(results, part.outputs, strict=True) if not dependences[node] <= binding]
        _require(not wrong, f"{wrong} change more often than the part runs")
        _require(set(part.outputs) <= used, "a part returns values that no later part takes")
        known.update(dict.fromkeys(part.outputs, "prompt" if part is split.prelude else "timestep"))
    taken = split.step.program.graph_signature.user_inputs
    _require(len(taken) == len(split.step.inputs) + len(variant.reused), f"the step takes {len(taken)} inputs")
    returned = len(outputs_of(split.step.program.graph)), len(outputs_of(variant.program.graph))
    _require(returned[0] == returned[1], f"the step returns {returned[0]} values, expected {returned[1]}")
    weights_of_parts = {name for part in split.parts for name in part.weights}
    difference = sorted(weights_of_parts ^ set(variant.weights))
    _require(not difference, f"the weights of the parts are not those of the graph: {difference}")


def _require_no_avoidable_weight(program: ExportedProgram, dependences: Dependences, weights: _Weights) -> None:
    """Check that a weight that only values of the timestep need is no larger than these values."""
    readers: dict[Node, list[Node]] = {}
    for node in program.graph.nodes:
        if dependences[node]:
            for weight in weights.read[node]:
                readers.setdefault(weight, []).append(node)
    avoidable = [
        weight.name for weight, nodes in readers.items()
        if weight in weights.parameters
        and all("latents" not in dependences[node] for node in nodes)
        and _cost(weight) > sum(_cost(node) + _VALUE + 1 for node in nodes)
    ]  # fmt: skip
    _require(not avoidable, f"weights are left in the step that only values of the timestep need: {avoidable}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise VerificationError(f"A graph split by binding time is not valid: {problem}. Please report this.")
