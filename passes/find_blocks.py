"""Find the stacks of transformer blocks in a graph, and in them residuals over ranges of blocks and feed-forwards.

Blocks are recognized by module boundaries and data flow: a stack consists of the numbered modules of one list, each of
which contains an attention that depends on the latents. Everything else follows from the data flow.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.methods.method import Blocks, Kind, ValueOfBlocks
from tgate_compile.passes.attention_core import LAYOUT, attention_cores
from tgate_compile.passes.find_sites import PROJECTING, depends_on, unique_name, value_inputs
from tgate_compile.passes.follow_rows import SPLITS, Size, positive, rank, same_size, size_of, tensors_of
from tgate_compile.passes.graphs import Site, argument, operand, shape_of
from tgate_compile.passes.token_rows import Span, is_size, span_of_result, span_of_slice

logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: Returns the batch dimension of each of the given values; values without a batch dimension are left out.
BatchDimsOf = Callable[[Sequence[Node]], Mapping[Node, int]]

#: Operators that pass on a stream of tokens: casts, copies and limits of its values.
_PASSING = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.clamp.default,
    aten.clip.default,
}
#: Operators that take a part of a stream.
_PARTS = {aten.slice.Tensor, operator.getitem, *SPLITS}

MSG_NO_BLOCKS = (
    "{model} has no stack of transformer blocks that could be skipped: no list of its modules consists of blocks with "
    "an attention each. What works instead: fewer steps, or caching attention (T-GATE, PAB)."
)
MSG_EMPTY = (
    "blocks[{start}:{stop}] of {model} is empty: its stacks of transformer blocks have {counts} blocks. Compute fewer "
    "blocks at the front and at the end."
)
MSG_NO_RESIDUAL = (
    "The blocks {first} to {last} of {model} cannot be skipped: their output {value} does not continue one of their "
    "inputs with the same shape, so that no residual of it can be cached. Choose another range of blocks."
)
MSG_SEVERAL_STACKS = (
    "{model} has {count} stacks of transformer blocks, and a decision at run time needs exactly one, whose first "
    "blocks are computed before it. What works instead: BlockCache, which skips blocks at fixed steps."
)
MSG_NO_MEASURE = (
    "In {model}, the {value} of {block} cannot be measured: {reason}. What works instead: FirstBlockCache, which "
    "measures the residual of the first block."
)


@dataclass(frozen=True)
class _Stream:
    """A value that leaves a range of blocks, and the value that enters it and that the blocks add to."""

    end: Node
    begin: Node


class _Graph:
    """A graph with the dependencies that the searches of this module share."""

    def __init__(self, graph_module: torch.fx.GraphModule, latents: Iterable[Node]) -> None:
        self.graph = graph_module.graph
        self.order = {node: position for position, node in enumerate(self.graph.nodes)}
        self.of_latents = depends_on(self.graph, latents)
        self.paths = {node: [(str(call), str(entry[0])) for call, entry in _stack(node)] for node in self.graph.nodes}

    def inside(self, paths: Collection[str]) -> set[Node]:
        """Return the nodes that were traced in one of the modules at `paths`."""
        wanted = set(paths)
        return {node for node, stack in self.paths.items() if any(path in wanted for _, path in stack)}


def _stack(node: Node) -> Iterable[tuple[object, tuple[str, object]]]:
    stack: Mapping[object, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    return stack.items()


def find_ranges(
    graph_module: torch.fx.GraphModule,
    latents: Sequence[Node],
    ranges: Mapping[Kind, Blocks],
    model: str,
    batch_dims: BatchDimsOf | None = None,
    times: Sequence[Node] = (),
) -> list[Site]:
    """Return the sites of the residuals over ranges of blocks, in graph order. The graph is not changed.

    The value of a site leaves the range, and its base enters it. If text and image have separate streams of tokens, the
    range has a site for each stream that is used after it. For the kind `measured` there is one site: the image's
    residual, or another value of the range. `times` are the inputs that hold the timestep.

    Raises:
        UnsupportedModelError: there are no such blocks, or a value that leaves them is not the continuation of one
            that enters them, or the value to be measured is not found.
    """
    whole = _Graph(graph_module, latents)
    stacks = _stacks(whole)
    if not stacks:
        raise UnsupportedModelError(MSG_NO_BLOCKS.format(model=model))
    found: list[tuple[Kind, str, Node, Node | None]] = []
    if "measured" in ranges and len(stacks) != 1:
        raise UnsupportedModelError(MSG_SEVERAL_STACKS.format(model=model, count=len(stacks)))
    for kind, chosen in ranges.items():
        skipped = [blocks for stack in stacks if (blocks := stack[chosen.start : chosen.stop])]
        if not skipped:
            counts = " and ".join(str(len(stack)) for stack in stacks)
            stop = "" if chosen.stop is None else chosen.stop
            raise UnsupportedModelError(MSG_EMPTY.format(start=chosen.start, stop=stop, model=model, counts=counts))
        for blocks in skipped:
            if chosen.value != "residual":
                node = _value_of(whole, blocks[0], chosen.value, times, model)
                found.append((kind, blocks[0], node, None))
                continue
            streams = _streams(whole, blocks)
            if isinstance(streams, Node):
                raise UnsupportedModelError(
                    MSG_NO_RESIDUAL.format(first=blocks[0], last=blocks[-1], model=model, value=streams.name)
                )
            if kind == "measured":  # the text does not depend on the latents before the first block
                streams = [stream for stream in streams if stream.begin in whole.of_latents][:1]
            found += [(kind, _name_of(blocks), stream.end, stream.begin) for stream in streams]
    sites = _sites(found, batch_dims)
    for kind in ranges:
        if kind == "measured" and not any(site.kind == kind for site in sites):
            reason = "no value of it depends on the latents and has one row for each of them"
            block = stacks[0][0]
            raise UnsupportedModelError(
                MSG_NO_MEASURE.format(model=model, value=ranges[kind].value, block=block, reason=reason)
            )
    logger.debug("found %d residuals of blocks", len(sites))
    return sites


def _value_of(whole: _Graph, block: str, value: ValueOfBlocks, times: Sequence[Node], model: str) -> Node:
    """Return a value that TeaCache measures: the input of the first attention in `block`, or the time embedding.

    The input is what the queries are projected from, after normalization and modulation with the timestep.
    """

    def refused(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(MSG_NO_MEASURE.format(model=model, value=value, block=block, reason=reason))

    of_times = depends_on(whole.graph, times)
    if value == "time embedding":
        made = {node for node in whole.graph.nodes if _is_time_embedding(node)}
        ends: list[Node] = [node for node in whole.graph.nodes if node in made and not made.issuperset(node.users)]
        if len(ends) != 1 or ends[0] not in of_times or ends[0] in whole.of_latents:
            raise refused(f"there are {len(ends)} values of modules called TimestepEmbedding, expected one")
        return ends[0]
    own = whole.inside([block])
    projected = [operand(node, 0) for node in whole.graph.nodes if node in own and node.target in PROJECTING]
    source = next((node for node in projected if node in whole.of_latents), None)
    if source is None or source not in own:
        raise refused("the block projects no value of its own that depends on the latents")
    if source not in of_times:
        raise refused("what its attention takes does not depend on the timestep")
    return source


def _is_time_embedding(node: Node) -> bool:
    modules = [(path, str(kind).rstrip("'>")) for _, (path, kind) in _stack(node)]
    return any(kind.endswith("TimestepEmbedding") and "time" in path for path, kind in modules)


def find_feed_forward(
    graph_module: torch.fx.GraphModule, latents: Sequence[Node], batch_dims: BatchDimsOf | None = None
) -> list[Site]:
    """Return the sites of the outputs of feed-forward modules, in graph order. The graph is not changed.

    A feed-forward module is a direct child of a transformer block. It has no attention, multiplies values that depend
    on the latents by weights at least twice, and returns one value.
    """
    whole = _Graph(graph_module, latents)
    blocks = {path for stack in _stacks(whole, joined=False) for path in stack}
    children: dict[tuple[str, str], list[Node]] = {}
    for node, stack in whole.paths.items():
        at = next((i for i, (_, path) in enumerate(stack) if path in blocks), None)
        if at is not None and at + 1 < len(stack):
            children.setdefault(stack[at + 1], []).append(node)
    with_attention = {entry for core in attention_cores(whole.graph) for entry in whole.paths[core.node]}
    found: list[tuple[Kind, str, Node, Node | None]] = []
    for child, nodes in children.items():
        own = set(nodes)
        products = [node for node in nodes if node.target in PROJECTING and operand(node, 0) in whole.of_latents]
        ends = [node for node in nodes if not is_size(node) and any(user not in own for user in node.users)]
        if child not in with_attention and len(products) >= 2 and len(ends) == 1:
            found.append(("ff", child[1], ends[0], None))
    sites = _sites(found, batch_dims)
    logger.debug("found %d feed-forwards", len(sites))
    return sites


def _sites(found: Sequence[tuple[Kind, str, Node, Node | None]], batch_dims: BatchDimsOf | None) -> list[Site]:
    dims = dict.fromkeys((value for _, _, value, _ in found), 0)
    if batch_dims is not None:
        dims = dict(batch_dims(list(dims)))
    sites: list[Site] = []
    for kind, path, value, base in found:
        if value not in dims:
            continue  # the value is the same for the whole batch
        name = unique_name(path, [site.name for site in sites])
        fake, batch = value.meta["val"], dims[value]
        shape = list(fake.shape)
        shape.insert(0, shape.pop(batch))
        base_name = None if base is None else base.name
        sites.append(Site(kind, name, value.name, tuple(shape), fake.dtype, fake.dtype, batch, base=base_name))
    return sites


def _stacks(whole: _Graph, *, joined: bool = True) -> list[list[str]]:
    """Return the paths of the blocks of each stack, in the order in which they run.

    With `joined`, stacks of the denoiser itself (as opposed to those in the levels of a UNet) that continue the same
    streams of tokens become one, as in FLUX, and only the longest of these is returned, because the others prepare its
    inputs.
    """
    lists: dict[str, dict[str, int]] = {}
    for core in attention_cores(whole.graph):
        if core.node not in whole.of_latents:
            continue
        for _, path in whole.paths[core.node]:
            owner, _, number = path.rpartition(".")
            if number.isdigit():
                lists.setdefault(owner, {}).setdefault(path, whole.order[core.node])
    innermost = [blocks for owner, blocks in lists.items() if not any(_is_within(other, blocks) for other in lists)]
    stacks = [sorted(blocks, key=blocks.__getitem__) for blocks in innermost]
    starts = {id(stack): min(lists[stack[0].rpartition(".")[0]].values()) for stack in stacks}
    stacks.sort(key=lambda stack: starts[id(stack)])
    own = [stack for stack in stacks if not any(part.isdigit() for part in stack[0].split(".")[:-1])]
    if not joined or not own:
        return stacks
    positions = {path: position for blocks in lists.values() for path, position in blocks.items()}
    chains = [own[0]]
    for stack in own[1:]:
        together = sorted([*chains[-1], *stack], key=positions.__getitem__)
        if isinstance(_streams(whole, together), Node):
            chains.append(stack)
        else:
            chains[-1] = together
    return [max(chains, key=len)]


def _is_within(owner: str, blocks: Collection[str]) -> bool:
    return any(owner.startswith(f"{block}.") for block in blocks)


def _name_of(blocks: Sequence[str]) -> str:
    """Return a name such as `transformer_blocks.1-27`, or with both paths if the range spans several lists."""
    (first, last), owner = (blocks[0], blocks[-1]), blocks[0].rpartition(".")[0]
    if first == last:
        return first
    return f"{first}-{last.rpartition('.')[2] if last.rpartition('.')[0] == owner else last}"


def _streams(whole: _Graph, blocks: Sequence[str]) -> list[_Stream] | Node:
    """Return the streams through the range of `blocks`, or a value that leaves it without continuing one that enters.

    The range includes the nodes between the blocks. Values that do not depend on the latents may leave it.
    """
    interior = _interior(whole, whole.inside(blocks))
    streams: dict[Node, _Stream] = {}
    queue: list[Node] = [node for node in whole.graph.nodes if node in interior and _leaves(whole, node, interior)]
    for node in queue:  # grows during the loop
        begin = _origin(node, interior) or _only_input_like(whole, node, interior)
        if begin is not None:
            streams[node] = _Stream(node, begin)
            continue
        outside = [user for user in node.users if user not in interior and not is_size(user)]
        if not all(user.target in LAYOUT or user.target in _PARTS for user in outside):
            return node
        interior.update(outside)  # take the parts apart first, or restore the layout
        queue += [user for user in outside if _leaves(whole, user, interior) and user not in queue]
    return sorted(streams.values(), key=lambda stream: whole.order[stream.end])


def _interior(whole: _Graph, inside: set[Node]) -> set[Node]:
    """Return `inside`, and the nodes that depend on it and that it depends on."""
    after = depends_on(whole.graph, inside)
    interior = set(inside)
    needed = set(inside)
    for node in reversed(list(whole.graph.nodes)):
        if node in needed:
            needed.update(value_inputs(node))
            if node in after:
                interior.add(node)
    return interior


def _leaves(whole: _Graph, node: Node, interior: set[Node]) -> bool:
    uses = [user for user in node.users if user not in interior and not is_size(user)]
    return bool(uses) and node in whole.of_latents and not is_size(node)


def _origin(node: Node, interior: set[Node], part: Span | None = None) -> Node | None:
    """Return the value outside of `interior` that `node` continues: it has been added to, but not transformed.

    `part` is the part of `node` to follow, if it is a concatenation of several streams.
    """
    if node not in interior:
        return node if part is None else None
    target = node.target
    if target in _PASSING:
        return _origin(operand(node, 0), interior, part)
    if target is aten.add.Tensor:
        same = [each for each in node.args if isinstance(each, Node) and _same_shape(each, node)]
        return next((found for each in same if (found := _origin(each, interior, part)) is not None), None)
    taken = _span_of(node)
    if taken is not None:
        source = operand(node, 0)
        source = operand(source, 0) if source.target in SPLITS else source
        if same_size(taken.stop - taken.start, size_of(shape_of(source)[taken.dim])):
            return _origin(source, interior, part)
        return _origin(source, interior, taken) if part is None else None
    if (
        part is not None
        and target is aten.cat.default
        and positive(argument(node, 1, "dim", 0), rank(node)) == part.dim
    ):
        begin: Size = 0
        for each in tensors_of(node):
            end = begin + size_of(shape_of(each)[part.dim])
            if same_size(begin, part.start) and same_size(end, part.stop):
                return _origin(each, interior)
            begin = end
    return None


def _span_of(node: Node) -> Span | None:
    """Return the part of its operand that `node` takes; None if it does not take a part."""
    if node.target is aten.slice.Tensor:
        return span_of_slice(node)
    return span_of_result(node) if node.target is operator.getitem else None


def _only_input_like(whole: _Graph, node: Node, interior: set[Node]) -> Node | None:
    """Return the only value that enters `interior`, depends on the latents and has the shape of `node`."""
    entering = {
        source
        for inner in interior
        for source in value_inputs(inner)
        if source not in interior and source in whole.of_latents and _same_shape(source, node)
    }
    return entering.pop() if len(entering) == 1 else None


def _same_shape(one: Node, other: Node) -> bool:
    values = (one.meta.get("val"), other.meta.get("val"))
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    sizes, others = ([size_of(size) for size in shape_of(node)] for node in (one, other))
    return len(sizes) == len(others) and all(map(same_size, sizes, others))
