"""Find what can be cached in a captured graph: attentions by data flow, and a UNet's deep feature."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.methods.method import Kind
from tgate_compile.passes.attention_core import LAYOUT, SCALING, AttentionCore, attention_cores, product_operands
from tgate_compile.passes.editing import operand
from tgate_compile.passes.graphs import Site

aten = torch.ops.aten

# Take of their second operand, or of their only one, no more than its dtype or shape.
_AS = {aten.type_as.default, aten.view_as.default, aten.expand_as.default, aten.reshape_as.default}
_LIKE = {
    aten.empty_like.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
}


def depends_on(
    graph: torch.fx.Graph, roots: Iterable[torch.fx.Node], *, cut: Collection[torch.fx.Node] = ()
) -> set[torch.fx.Node]:
    """The nodes of `graph` whose value depends on that of one of `roots` (these included).

    What a node depends on only through the nodes of `cut` does not count. Neither do sizes and dtypes: in a graph with
    free sizes even the text's keys are reshaped by the latents' batch.
    """
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in value_inputs(node)) and not _is_size(node) and node not in cut:
            dependent.add(node)
    return dependent


def value_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes whose values `node` uses, and not their shape, dtype or device alone."""
    if node.target in _LIKE:
        return []
    return node.all_input_nodes[:1] if node.target in _AS else node.all_input_nodes


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def innermost_call(node: Node) -> tuple[str, str]:
    """The innermost call of a module that `node` was traced in, and the module's path; both are "" outside of any.

    A module that is called several times has several calls and one path.
    """
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    call, (path, _) = list(stack.items())[-1]
    return str(call), str(path)


def is_in_call(node: Node, call: str) -> bool:
    """Whether `node` was traced in this call of a module, or in one below it."""
    return call in node.meta.get("nn_module_stack", {})


def is_inside(node: Node, path: str) -> bool:
    """Whether `node` was traced in the module at `path`, or in one below it."""
    return any(entry[0] == path for entry in node.meta.get("nn_module_stack", {}).values())


logger = logging.getLogger(__name__)

#: "other": neither; its queries do not follow the latents, say, or its keys and values are weights.
Role = Literal["cross", "self", "other"]

#: What modules call themselves whose attention is between the frames of a video, in diffusers and in models like its.
_TEMPORAL = re.compile(r"(^|[._])(temporal|temp|motion)")

#: Multiplies its first operand by weights.
PROJECTING = {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a denoiser's graph, by what they are for.

    Attributes:
        latents: what is denoised. There are several if the denoiser has several modalities.
        times: the timestep, or noise level, under whatever name.
        conditions: everything else that is a tensor: text, masks, images, labels.
    """

    latents: tuple[Node, ...]
    times: tuple[Node, ...] = ()
    conditions: tuple[Node, ...] = ()


def find_attention(
    graph_module: torch.fx.GraphModule,
    inputs: Inputs,
    kinds: Collection[Kind] = ("cross", "self"),
    batch_dims: Callable[[Sequence[Node]], Mapping[Node, int]] | None = None,
) -> list[Site]:
    """The attention sites of `graph_module` of these kinds, in graph order; the graph is left alone.

    An attention is a cross-attention when its query depends on the latents, its key and value do not, and these depend
    on a condition (on the timestep as well, perhaps). It is a self-attention when query, key and value depend on the
    latents. Joint attention (SD3, Flux) has keys of both kinds in one tensor, and looks like the latter; a model that
    has nothing else is refused where it is captured.

    The site's value is what the enclosing module returns, after its output projection and dropout and before its
    residual connection and rescaling, where it has these (diffusers' `Attention`): what the paper caches. Such a value
    depends on the latents and the timestep through attention alone. If what the module returns does not, because the
    attention is written out in a larger block, then the value is that of the attention itself, followed through its
    output projection as far as it is only reshaped, cast, scaled and multiplied with weights.

    Args:
        graph_module: a captured denoiser.
        inputs: its inputs.
        kinds: the kinds of attention to find. With `temporal`, self-attention between the frames of a video, which is
            told by the names of its modules, is of that kind, and of `self` otherwise.
        batch_dims: says for values which of their dimensions has the rows of the batch; a value that is left out has
            them in none. By default it is the first.
    """
    graph = graph_module.graph
    roles = attention_roles(graph, inputs)
    of_inputs = depends_on(graph, (*inputs.latents, *inputs.times, *inputs.conditions))
    values: dict[AttentionCore, list[Node]] = {}
    for kind in ("cross", "self"):
        cores = [core for core, role in roles if role == kind]
        # What follows the present step other than through attentions of this kind: it must stay live.
        live = depends_on(graph, (*inputs.latents, *inputs.times), cut={core.node for core in cores})
        values.update((core, list(_possible_values(core.node, live, of_inputs))) for core in cores)

    roles_wanted = {"self" if kind == "temporal" else kind for kind in kinds}
    wanted = [node for core, role in roles if role in roles_wanted for node in values[core]]
    dims = dict.fromkeys(wanted, 0) if batch_dims is None else batch_dims(wanted)
    sites: dict[Node, Site] = {}
    names: dict[Node, str] = {}  # of attentions of all kinds, so that they depend on nothing but the model
    for core, role in roles:
        if role == "other":
            continue
        site_kind: Kind = role
        first = values[core][0]
        if first not in names:
            names[first] = _unique(_without_processor(innermost_call(core.node)[1]), names.values())
        value = next((node for node in values[core] if node in dims), None)
        if site_kind == "self" and "temporal" in kinds and _TEMPORAL.search(names[first]):
            site_kind = "temporal"
        if site_kind not in kinds or value is None or value in sites:
            continue
        fake, batch = value.meta["val"], dims[value]
        shape = list(fake.shape)
        shape.insert(0, shape.pop(batch))
        sites[value] = Site(site_kind, names[first], value.name, tuple(shape), fake.dtype, fake.dtype, batch)
    logger.debug("found %d attention sites", len(sites))
    return list(sites.values())


def attention_roles(graph: torch.fx.Graph, inputs: Inputs) -> list[tuple[AttentionCore, Role]]:
    """What each attention of `graph` is, in graph order."""
    of_latents = depends_on(graph, inputs.latents)
    of_conditions = depends_on(graph, inputs.conditions)
    return [(core, _role(core, of_latents, of_conditions)) for core in attention_cores(graph)]


def count_roles(graph: torch.fx.Graph, inputs: Inputs) -> Counter[Role]:
    """How many attentions of each role `graph` has."""
    return Counter(role for _, role in attention_roles(graph, inputs))


def _role(core: AttentionCore, of_latents: set[Node], of_conditions: set[Node]) -> Role:
    pairs = [tuple(one in of_latents for one in pair) for pair in core.scores]
    if core.value in of_latents:
        return "self" if any(all(pair) for pair in pairs) else "other"
    if any(all(pair) for pair in pairs) or not any(any(pair) for pair in pairs):
        return "other"
    if core.is_ordered and pairs[0] != (True, False):
        return "other"  # the keys follow the latents, and the queries do not
    keys = {one for pair in core.scores for one in pair if one not in of_latents}
    follows_a_condition = [core.value in of_conditions, any(key in of_conditions for key in keys)]
    # A product with weights on both sides is no attention, and linear attention has nothing else to be known by.
    return "cross" if (all if core.is_linear else any)(follows_a_condition) else "other"


def _unique(path: str, names: Collection[str]) -> str:
    """`path`, with a number if the module has several attentions, or is called several times."""
    path = path or "attention"
    numbered = (path if i == 1 else f"{path}#{i}" for i in range(1, len(names) + 2))
    # Names that differ in punctuation alone would be the same as names of a graph's inputs.
    taken = {re.sub(r"\W", "_", name) for name in names}
    return next(name for name in numbered if re.sub(r"\W", "_", name) not in taken)


def _without_processor(path: str) -> str:
    # Some attention processors (IP-Adapter's) are modules too; the site is named after the attention.
    return path.removesuffix(".processor")


def _possible_values(core: Node, live: set[Node], of_inputs: set[Node]) -> Iterator[Node]:
    """The values that may stand for the attention `core`, the best first: none depends on what is `live`."""
    call, _ = innermost_call(core)
    outlet = _outlet(core, call)
    if outlet is not None:
        outlet = _before_residual_and_rescale(outlet, call)
        if outlet not in live:
            yield outlet
    yield from reversed(list(_projected(core, of_inputs)))


def _outlet(core: Node, call: str) -> Node | None:
    """The one value that this `call` of a module makes of its attention `core` and that is used outside of it."""
    made = {core: None}
    queue = [core]
    for node in queue:  # which grows
        new = [user for user in node.users if is_in_call(user, call) and user not in made]
        made.update(dict.fromkeys(new))
        queue += new
    leaving = [node for node in made if any(not is_in_call(user, call) for user in node.users)]
    return leaving[0] if len(leaving) == 1 else None


def _before_residual_and_rescale(node: Node, call: str) -> Node:
    if node.target is aten.div.Tensor and not isinstance(node.args[1], Node):
        return _before_residual_and_rescale(operand(node, 0), call)
    if node.target is aten.add.Tensor:
        left, right = node.args[:2]
        if (
            isinstance(left, Node)
            and isinstance(right, Node)
            and is_in_call(left, call)
            and not is_in_call(right, call)
        ):
            return left
    return node


def _projected(core: Node, of_inputs: set[Node]) -> Iterator[Node]:
    """`core`, and what becomes of it while only layout, dtype, scale and weights have a part in it.

    All of this is affine, so that the mean of the guidance halves is the same wherever it is taken.
    """
    node = core
    while True:
        yield node
        following = list(node.users)
        if len(following) != 1 or not _is_affine(following[0], node, of_inputs):
            return
        node = following[0]


def _is_affine(user: Node, node: Node, of_inputs: set[Node]) -> bool:
    others = [source for source in value_inputs(user) if source is not node]
    if user.op != "call_function" or any(source in of_inputs for source in others):
        return False
    if user.target in LAYOUT or user.target in PROJECTING:
        return user.args[0] is node
    if user.target in SCALING or user.target is aten.add.Tensor:
        # Divided by, the value would be no linear one any more; and added to itself, it has no other operand.
        return user.args[0] is node or (user.target is not aten.div.Tensor and user.args[1] is node)
    return product_operands(user) is not None


def find_deep_feature(graph_module: torch.fx.GraphModule, layer: str) -> Site:
    """The deep feature that enters up layer `layer`, a module path; the graph is left alone.

    A UNet's up layer takes cat([feature from below, skip connection]); the feature is its first operand. Replaced by
    a cached one, all of the layers below are dead: nothing says which these are, they simply are not needed any more.
    Source: DeepCache, arXiv 2312.00858, section 3.2.

    Raises:
        UnsupportedModelError: there is no such concatenation, or several.
    """
    joins = {
        source
        for node in graph_module.graph.nodes
        if is_inside(node, layer)
        for source in node.all_input_nodes
        if source.target is aten.cat.default and not is_inside(source, layer)
    }
    if len(joins) != 1:
        raise UnsupportedModelError(
            f"Cannot find where {layer!r} joins the feature from below with its skip connection, so that DeepCache "
            "cannot be used. Please report the model class."
        )
    feature = _joined(joins.pop())[0]
    value = feature.meta["val"]
    return Site("deep", layer, feature.name, tuple(value.shape), value.dtype, value.dtype)


def _joined(cat: Node) -> list[Node]:
    tensors = cat.args[0]
    assert isinstance(tensors, (list, tuple))
    return [tensor for tensor in tensors if isinstance(tensor, Node)]
