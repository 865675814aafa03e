"""Find the sites of a captured graph: attentions, recognized by data flow, and a UNet's deep feature."""

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
from tgate_compile.passes.graphs import Site, operand

aten = torch.ops.aten

# Operators that use only the dtype or shape of their second operand (`_AS`), or of their only one (`_LIKE`).
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
    """Return the nodes of `graph` whose value depends on that of one of `roots`, including the roots.

    Dependencies through the nodes of `cut` do not count. Neither do sizes and dtypes: in a graph with free sizes even
    the text's keys are reshaped by the latents' batch.
    """
    dependent = set(roots)
    for node in graph.nodes:  # in topological order
        if any(source in dependent for source in value_inputs(node)) and not _is_size(node) and node not in cut:
            dependent.add(node)
    return dependent


def value_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose values `node` uses, beyond their shape, dtype or device."""
    if node.target in _LIKE:
        return []
    return node.all_input_nodes[:1] if node.target in _AS else node.all_input_nodes


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def innermost_call(node: Node) -> tuple[str, str]:
    """Return the innermost module call that `node` was traced in, and the module's path; both are "" if there is none.

    A module that is called several times has several calls and one path.
    """
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    call, (path, _) = list(stack.items())[-1]
    return str(call), str(path)


def is_in_call(node: Node, call: str) -> bool:
    """Return whether `node` was traced in the module call `call`, or in one below it."""
    return call in node.meta.get("nn_module_stack", {})


def is_inside(node: Node, path: str) -> bool:
    """Return whether `node` was traced in the module at `path`, or in one below it."""
    return any(entry[0] == path for entry in node.meta.get("nn_module_stack", {}).values())


logger = logging.getLogger(__name__)

#: The role of an attention. "other" is neither of the two: for example, its queries do not depend on the latents, or
#: its keys and values are weights.
Role = Literal["cross", "self", "other"]

#: Names of modules with attention between the frames of a video, in diffusers and similar models.
_TEMPORAL = re.compile(r"(^|[._])(temporal|temp|motion)")

#: Operators that multiply their first operand by weights.
PROJECTING = {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a denoiser's graph, by role.

    Attributes:
        latents: the latents; several if the denoiser has several modalities.
        times: the timestep or noise level, under any name.
        conditions: all other tensors: text, masks, images, labels.
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
    """Return the attention sites of `graph_module` of these kinds, in graph order. The graph is not changed.

    An attention is a cross-attention if its query depends on the latents, and its key and value do not but depend on a
    condition (and possibly on the timestep). It is a self-attention if query, key and value depend on the latents.
    Joint attention (SD3, Flux) has keys of both kinds in one tensor, and looks like self-attention; `capture` refuses a
    model that has no other attention.

    The value of a site is the return value of the enclosing module, after its output projection and dropout, but before
    its residual connection and rescaling, if it has these (diffusers' `Attention`). This is what the paper caches. It
    depends on the latents and the timestep through attention alone. If the module's return value does not, because the
    attention is part of a larger block, the value is the result of the attention itself, followed through its output
    projection until an operation other than a reshape, cast, scaling or multiplication by weights.

    Args:
        graph_module: a captured denoiser.
        inputs: its inputs.
        kinds: the kinds of attention to find. With `temporal`, self-attention between the frames of a video, which is
            recognized by the names of its modules, has that kind; otherwise its kind is `self`.
        batch_dims: returns the batch dimension of each of the given values; values without a batch dimension are left
            out. By default it is the first dimension.
    """
    graph = graph_module.graph
    roles = attention_roles(graph, inputs)
    of_inputs = depends_on(graph, (*inputs.latents, *inputs.times, *inputs.conditions))
    values: dict[AttentionCore, list[Node]] = {}
    for kind in ("cross", "self"):
        cores = [core for core, role in roles if role == kind]
        # Values that depend on the present step other than through attentions of this kind cannot be cached.
        live = depends_on(graph, (*inputs.latents, *inputs.times), cut={core.node for core in cores})
        values.update((core, list(_possible_values(core.node, live, of_inputs))) for core in cores)

    selected_roles = {"self" if kind == "temporal" else kind for kind in kinds}
    candidates = [node for core, role in roles if role in selected_roles for node in values[core]]
    dims = dict.fromkeys(candidates, 0) if batch_dims is None else batch_dims(candidates)
    sites: dict[Node, Site] = {}
    names: dict[Node, str] = {}  # names of attentions of all kinds, so that they do not depend on `kinds`
    for core, role in roles:
        if role == "other":
            continue
        site_kind: Kind = role
        first = values[core][0]
        if first not in names:
            names[first] = unique_name(without_processor(innermost_call(core.node)[1]), names.values())
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
    """Return the attentions of `graph` with their roles, in graph order."""
    of_latents = depends_on(graph, inputs.latents)
    of_conditions = depends_on(graph, inputs.conditions)
    return [(core, _role(core, of_latents, of_conditions)) for core in attention_cores(graph)]


def count_roles(graph: torch.fx.Graph, inputs: Inputs) -> Counter[Role]:
    """Return the number of attentions of each role in `graph`."""
    return Counter(role for _, role in attention_roles(graph, inputs))


def _role(core: AttentionCore, of_latents: set[Node], of_conditions: set[Node]) -> Role:
    pairs = [tuple(one in of_latents for one in pair) for pair in core.scores]
    if core.value in of_latents:
        return "self" if any(all(pair) for pair in pairs) else "other"
    if any(all(pair) for pair in pairs) or not any(any(pair) for pair in pairs):
        return "other"
    if core.is_ordered and pairs[0] != (True, False):
        return "other"  # the keys depend on the latents, but the queries do not
    keys = {one for pair in core.scores for one in pair if one not in of_latents}
    follows_a_condition = [core.value in of_conditions, any(key in of_conditions for key in keys)]
    # Linear attention is just two products, so key and value must both depend on a condition to rule out weights.
    return "cross" if (all if core.is_linear else any)(follows_a_condition) else "other"


def unique_name(path: str, names: Collection[str]) -> str:
    """Return `path`, with a number if the name is taken: the module has several attentions or several calls."""
    path = path or "attention"
    numbered = (path if i == 1 else f"{path}#{i}" for i in range(1, len(names) + 2))
    # Names that differ only in punctuation would give the same names of graph inputs.
    taken = {re.sub(r"\W", "_", name) for name in names}
    return next(name for name in numbered if re.sub(r"\W", "_", name) not in taken)


def without_processor(path: str) -> str:
    """Return the path of an attention, given that of its processor: some (IP-Adapter's) are modules too."""
    return path.removesuffix(".processor")


def _possible_values(core: Node, live: set[Node], of_inputs: set[Node]) -> Iterator[Node]:
    """Yield the values that can be cached for the attention `core`, the best first; none of them is in `live`."""
    call, _ = innermost_call(core)
    outlet = _outlet(core, call)
    if outlet is not None:
        outlet = _before_residual_and_rescale(outlet, call)
        if outlet not in live:
            yield outlet
    yield from reversed(list(_projected(core, of_inputs)))


def _outlet(core: Node, call: str) -> Node | None:
    """Return the only value derived from the attention `core` in its module call that is used outside of the call."""
    made = {core: None}
    queue = [core]
    for node in queue:  # grows during the loop
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
    """Yield `core`, and the values derived from it by changes of layout, dtype and scale and by weights only.

    All of these operations are affine, so the mean of the guidance halves can be taken at any of the values.
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
        # A quotient is not linear in its divisor. A value added to itself has no other operand.
        return user.args[0] is node or (user.target is not aten.div.Tensor and user.args[1] is node)
    return product_operands(user) is not None


def find_deep_feature(graph_module: torch.fx.GraphModule, layer: str) -> Site:
    """Return the site of the deep feature that enters the up layer at the path `layer`. The graph is not changed.

    A UNet's up layer takes cat([feature from below, skip connection]); the feature is the first operand. Once it is
    replaced by a cached value, all layers below it are dead code.
    Source: DeepCache, arXiv 2312.00858, section 3.2.

    Raises:
        UnsupportedModelError: there is not exactly one such concatenation.
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
            f"Cannot find where {layer!r} joins the feature from below with its skip connection, so DeepCache cannot "
            "be used. Please report the model class."
        )
    feature = _joined(joins.pop())[0]
    value = feature.meta["val"]
    return Site("deep", layer, feature.name, tuple(value.shape), value.dtype, value.dtype)


def _joined(cat: Node) -> list[Node]:
    tensors = cat.args[0]
    assert isinstance(tensors, (list, tuple))
    return [tensor for tensor in tensors if isinstance(tensor, Node)]
