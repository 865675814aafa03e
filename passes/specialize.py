"""Derive a phase's graph from the captured one: emit values, reuse values, remove dead code, verify."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from tgate_compile._errors import UnsupportedModelError, VerificationError
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.find_sites import depends_on
from tgate_compile.passes.graphs import (
    Captured,
    Emission,
    PassResult,
    Site,
    Variant,
    add_call,
    copy_graph,
    flat_program,
    is_mutable,
    operand,
    outputs_of,
    shape_of,
)
from tgate_compile.passes.token_rows import Stream, tokens_left

aten = torch.ops.aten


def emit(graph_module: torch.fx.GraphModule, emissions: Iterable[Emission]) -> PassResult:
    """Append the values at sites to the outputs, in the order of `emissions`.

    A merged value is the weighted mean of the guidance halves [uncond; cond], batch B, accumulated in at least fp32
    (arXiv 2404.02747, section 3.2, with equal weights). An emitted value has the site's `cache_dtype`, and its batch in
    the first dimension. `graph_module` is changed in place; its output is one flat tuple.
    """
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    output = graph.output_node()
    emitted = []
    for emission in emissions:
        value = nodes[emission.site.node]
        with graph.inserting_before(output):
            if emission.site.base is not None:
                base = nodes[emission.site.base]
                value = add_call(graph, aten.sub.Tensor, value, _in_dtype(graph, base, emission.site.dtype))
            if emission.site.batch != 0:
                value = add_call(graph, aten.movedim.int, value, emission.site.batch, 0)
            if emission.anchor is not None:
                _check_halves(value, emission.site)
                value = _merged(graph, value, emission.anchor)
            emitted.append(_cast(graph, _without_base(graph, value, emission.site), emission))
    output.args = ((*outputs_of(graph), *emitted),)
    return PassResult(len(emitted))


def _check_halves(value: Node, site: Site) -> None:
    rows = value.meta["val"].shape[0]
    if isinstance(rows, int) and rows % 2:
        raise UnsupportedModelError(
            f"The attention {site.name} is computed for each row of the batch apart ({rows} row in its value), so "
            "that the values of the guidance halves cannot be reduced to one when guidance ends. Freeze the text alone "
            "(FrozenText(step)), which keeps guidance, or end guidance alone (AdaptiveGuidance(step))."
        )


def _merged(graph: torch.fx.Graph, value: Node, anchor: float) -> Node:
    # Not chunk(2): with a free batch it is exported as a sequence, which ONNX optimizers cannot handle.
    dtype = value.meta["val"].dtype
    accumulated = torch.promote_types(dtype, torch.float32)
    halves = add_call(graph, aten.unflatten.int, value, 0, [2, -1])
    if anchor in (0.0, 1.0):
        return add_call(
            graph, aten.select.int, halves, 0, int(anchor)
        )  # exactly, even beside values that are not finite
    if anchor == 0.5:
        mean = add_call(graph, aten.mean.dim, halves, [0], False, dtype=accumulated)
    else:
        exact = halves if dtype == accumulated else add_call(graph, aten.to.dtype, halves, accumulated)
        uncond, cond = (add_call(graph, aten.select.int, exact, 0, half) for half in (0, 1))
        weighted = add_call(graph, aten.mul.Tensor, uncond, 1.0 - anchor)
        mean = add_call(graph, aten.add.Tensor, weighted, cond, alpha=anchor)
    return mean


def _without_base(graph: torch.fx.Graph, value: Node, site: Site) -> Node:
    """Return a contiguous copy of a text's keys or values, or of a residual, which can be views of those of all tokens.

    A cache would keep these alive, and compiled graphs expect contiguous caches. A measured value may be returned a
    second time, for the next part of the step.
    """
    copied = site.of_text or site.base is not None or site.kind in ("measured", "state")
    if not copied or _is_contiguous(value, site):
        return value
    return add_call(graph, aten.clone.default, value, memory_format=torch.contiguous_format)


def _is_contiguous(value: Node, site: Site) -> bool:
    """Return whether a value that passes to the next part of the step, and is no view, is certainly contiguous."""
    fake = value.meta["val"]
    return site.kind == "state" and all(isinstance(size, int) for size in fake.shape) and fake.is_contiguous()


def _cast(graph: torch.fx.Graph, value: Node, emission: Emission) -> Node:
    target, limit = emission.site.cache_dtype, torch.finfo(emission.site.cache_dtype).max
    if value.meta["val"].dtype == target:
        return value
    within = emission.anchor is None or 0.0 <= emission.anchor <= 1.0
    if not within or limit < torch.finfo(emission.site.dtype).max:
        # fp8 and fp16 have a small range: values beyond it become the largest number instead of infinity.
        value = add_call(graph, aten.clamp.default, value, -limit, limit)
    return add_call(graph, aten.to.dtype, value, target)


def _in_dtype(graph: torch.fx.Graph, value: Node, dtype: torch.dtype) -> Node:
    return value if value.meta["val"].dtype == dtype else add_call(graph, aten.to.dtype, value, dtype)


def cache_input_name(site: Site) -> str:
    """Return the name of the graph input for the cache of `site`, which is a valid Python identifier."""
    return f"cache_{site.kind}_" + re.sub(r"\W", "_", site.name)


def reuse(graph_module: torch.fx.GraphModule, sites: Iterable[Site]) -> PassResult:
    """Append an input to `graph_module` for each site, and use it instead of the site's value.

    The input has the site's `cache_dtype` and the batch in the first dimension; it is cast and transposed if the dtype
    or layout of the value in the graph differs. A residual is added to the present value of its base.

    The nodes that computed the value become dead code, which `remove_dead` removes.
    """
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    replaced: dict[Node, Node] = {}
    for site in sites:
        value = nodes[site.node]
        with graph.inserting_after(last_input):
            cached = graph.placeholder(cache_input_name(site))
        fake = value.meta["val"]
        same = site.batch == 0 and site.cache_dtype == site.dtype
        with fake.fake_mode:
            cached.meta["val"] = fake if same else fake.movedim(site.batch, 0).to(site.cache_dtype)
            if site.of_text or site.base is not None or site.kind == "state":
                cached.meta["val"] = cached.meta["val"].clone(memory_format=torch.contiguous_format)
        last_input = replacement = cached
        with graph.inserting_before(value):
            if site.cache_dtype != site.dtype:
                replacement = add_call(graph, aten.to.dtype, replacement, site.dtype)
            if site.batch != 0:
                replacement = add_call(graph, aten.movedim.int, replacement, 0, site.batch)
            if site.base is not None:
                # The base may be the value of another site: the end of one range is the beginning of the next.
                base = replaced.get(nodes[site.base], nodes[site.base])
                replacement = add_call(graph, aten.add.Tensor, _in_dtype(graph, base, site.dtype), replacement)
        value.replace_all_uses_with(replacement)
        replaced[value] = replacement
    return PassResult(len(replaced))


def remove_dead(graph_module: torch.fx.GraphModule) -> PassResult:
    """Remove the nodes that no output needs, then the inputs and parameters that no node uses."""
    graph = graph_module.graph
    before = len(graph.nodes)
    # By default fx keeps "impure" nodes, which include dropout and assertions. diffusers' output projections end in a
    # dropout, so by default nothing would be removed.
    graph.eliminate_dead_code(is_impure_node=_is_interface)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    return PassResult(before - len(graph.nodes))


def _is_interface(node: Node) -> bool:
    return node.op in ("placeholder", "output")


def remove_identities(graph_module: torch.fx.GraphModule) -> PassResult:
    """Replace operators that do nothing with the operand; the operators themselves become dead code.

    They have a small cost in an eager run, and other formats lack some of them: ONNX cannot squeeze a dimension that is
    not 1.
    """
    count = 0
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(operand(node, 0))
            count += 1
    return PassResult(count)


def _is_identity(node: Node) -> bool:
    if node.target is aten.dropout.default:
        return node.args[2] is False  # not training
    if node.target is aten.squeeze.dim:
        return len(shape_of(operand(node, 0))) == len(shape_of(node))
    return False


def verify(variant: Variant, captured: Captured) -> None:
    """Check that `variant` is a valid graph of its phase, derived from `captured`.

    - It returns the denoiser's outputs, followed by one value for each emission: with batch B if it is merged, else
      with the site's own shape.
    - It takes one cache for each reused site, and has no attention or weight that only cached values need.
    - Every node has `meta["val"]`, and no operator works in place.
    - No output is an input, and no two outputs are the same value.

    Raises:
        VerificationError: the variant violates one of these conditions, which the message names.
    """
    graph = variant.program.graph
    outputs = outputs_of(graph)
    returned = captured.outputs_of(variant.phase)
    expected = returned + len(variant.emitted)
    _require(len(outputs) == expected, f"it has {len(outputs)} outputs, expected {expected}")
    _require(len(set(outputs)) == len(outputs), "one value is two of its outputs")
    _require(all(node.op != "placeholder" for node in outputs), "one of its outputs is an input")
    for node in graph.nodes:
        _require(node.op == "output" or "val" in node.meta, f"{node.name} has no meta['val']")
        _require(not is_mutable(node), f"{node.name} works in place, and could be lost as dead code")

    for emission, node in zip(variant.emitted, outputs[returned:], strict=True):
        site = emission.site
        shape = (site.shape[0] // 2, *site.shape[1:]) if emission.merged else site.shape
        _require(tuple(node.meta["val"].shape) == shape, f"{site.name} is emitted as {node.meta['val'].shape}")
        _require(node.meta["val"].dtype == site.cache_dtype, f"{site.name} is emitted as {node.meta['val'].dtype}")

    reused = {site.kind for site in captured.sites if site.of_text and site.kind in variant.phase.reuse}
    if captured.origins is not None and reused:
        streams = [stream for stream, kind in KINDS_OF_STREAMS.items() if kind in reused]
        tokens = tokens_left(graph, captured.origins, streams)
        _require(not tokens, f"the tokens of {sorted(reused)} are still computed: {[node.name for node in tokens]}")
    inputs = variant.program.graph_signature.user_inputs
    _require(len(inputs) == len(variant.inputs) + len(variant.reused), f"it takes {len(inputs)} inputs: {list(inputs)}")
    needed = _needed(variant, captured)
    left = [core.node.name for core in attention_cores(graph) if core.node.name not in needed]
    _require(not left, f"{len(left)} attentions are left that are reused: {left}")
    specs = captured.program.graph_signature.input_specs
    weights = {str(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT and spec.arg.name in needed}
    unneeded = sorted(set(variant.weights) - weights)
    _require(not unneeded, f"weights are left that only cached values need: {unneeded}")


def _needed(variant: Variant, captured: Captured) -> set[str]:
    """Return the names of the captured graph's nodes that are needed if the reused sites are inputs."""
    phase = variant.phase
    given = {site.node: site.base for site in sites_of(captured, phase) if site.kind in phase.taken}
    given |= {site.node: None for site in variant.reused if site.kind == "state"}
    graph = graph_of(captured, phase).graph
    nodes = {node.name: node for node in graph.nodes}
    kept = [
        name for emission in variant.emitted for name in (emission.site.node, emission.site.base) if name is not None
    ]
    queue = [*(() if phase.part == "head" else outputs_of(graph)), *(nodes[name] for name in kept)]
    needed = set(queue)
    for node in queue:  # grows during the loop
        base = given.get(node.name)
        sources = node.all_input_nodes if node.name not in given else [] if base is None else [nodes[base]]
        new = [source for source in sources if source not in needed]
        needed.update(new)
        queue += new
    return {node.name for node in needed}


#: The kind of a stream's keys and values.
KINDS_OF_STREAMS: Mapping[Stream, Kind] = {Stream.TEXT: "cross", Stream.REFERENCE: "reference"}


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise VerificationError(f"A rewritten graph is not valid: {problem}. Please report this.")


logger = logging.getLogger(__name__)


def graph_of(captured: Captured, phase: Phase) -> torch.fx.GraphModule:
    """Return the graph of `captured` that the variant of `phase` is derived from."""
    if _is_separated(captured, phase):
        assert captured.separated is not None
        return captured.separated
    whole: torch.fx.GraphModule = captured.program.graph_module
    return whole


def sites_of(captured: Captured, phase: Phase) -> tuple[Site, ...]:
    """Return the sites in the graph that the variant of `phase` is derived from."""
    if _is_separated(captured, phase):
        return (*(site for site in captured.sites if site.of_text), *captured.separated_sites)
    return captured.sites


def _is_separated(captured: Captured, phase: Phase) -> bool:
    reuses_text = any(site.of_text and site.kind in phase.reuse for site in captured.sites)
    return captured.separated is not None and reuses_text


def _state(captured: Captured, phase: Phase) -> tuple[Site, ...]:
    """Return the values that the head of a step that is decided at run time passes to the tail and the finish.

    The head computes the measured value and what enters the blocks that may be skipped. Of what it computes, the other
    parts take values that depend on the latents; they repeat the rest, and views, which need no work.
    """
    graph = graph_of(captured, phase).graph
    nodes = {node.name: node for node in graph.nodes}
    sites = sites_of(captured, phase)
    taken = {nodes[site.node] for site in sites if site.kind in phase.reuse}
    skipped = {
        nodes[site.node]: nodes[site.base] for site in sites if site.kind in phase.decided and site.base is not None
    }
    goals = [*skipped.values(), *(nodes[site.node] for site in sites if site.kind == "measured")]
    in_head, _ = _reached(goals, dict.fromkeys(taken), frozenset())
    roles = captured.roles
    of_latents = [name for name in captured.input_names if roles.get(name, "latents") == "latents"]
    inputs = [nodes[name] for name in of_latents if name in nodes]
    changing = depends_on(graph, [*inputs, *taken]) - {*inputs, *taken}
    passed = frozenset(node for node in in_head & changing if not _is_light(node))
    outputs = outputs_of(graph)
    _, by_tail = _reached([*outputs, *skipped, *skipped.values()], dict.fromkeys(taken), passed)
    _, by_finish = _reached(outputs, {**dict.fromkeys(taken), **skipped}, passed)
    crossing = by_tail | by_finish
    return tuple(_state_site(node) for node in graph.nodes if node in crossing)


def _state_site(node: Node) -> Site:
    value = node.meta["val"]
    return Site("state", f"head.{node.name}", node.name, tuple(value.shape), value.dtype, value.dtype)


def _reached(
    goals: Iterable[Node], given: Mapping[Node, Node | None], passed: Collection[Node]
) -> tuple[set[Node], set[Node]]:
    """Return the nodes that `goals` depend on, and those of `passed` at which the search ended.

    Each of `given` depends on the one node that it is mapped to, or on nothing.
    """
    queue = list(dict.fromkeys(goals))
    found, ends = set(queue), set[Node]()
    for node in queue:  # grows during the loop
        if node in passed:
            ends.add(node)
            continue
        base = given.get(node)
        sources = node.all_input_nodes if node not in given else [] if base is None else [base]
        new = [source for source in sources if source not in found]
        found.update(new)
        queue += new
    return found, ends


def _is_light(node: Node) -> bool:
    """Return whether `node` is an input, a size, a view or an operator that does nothing."""
    if node.target is operator.getitem:
        return _is_light(operand(node, 0))
    is_value = isinstance(node.meta["val"], (torch.Tensor, list, tuple))
    if node.op != "call_function" or not is_value or _is_identity(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _return_measure(graph_module: torch.fx.GraphModule, site: Site, replaced: int) -> None:
    """Return the relative change of the measured value instead of the first `replaced` outputs, with shape [1].

    It is `mean(abs(value - before)) / mean(abs(before))` in at least fp32, where `before` is a new input.
    """
    graph = graph_module.graph
    emitted = outputs_of(graph)[replaced:]
    value = emitted[0]  # heads keep no other values for later steps
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        before = graph.placeholder(cache_input_name(site))
    with value.meta["val"].fake_mode:
        before.meta["val"] = value.meta["val"].clone(memory_format=torch.contiguous_format)
    dtype = torch.promote_types(site.dtype, torch.float32)
    output = graph.output_node()
    with graph.inserting_before(output):
        now, then = _in_dtype(graph, value, dtype), _in_dtype(graph, before, dtype)
        change = add_call(graph, aten.abs.default, add_call(graph, aten.sub.Tensor, now, then))
        size = add_call(graph, aten.abs.default, then)
        means = [add_call(graph, aten.mean.default, each) for each in (change, size)]
        measure = add_call(graph, aten.reshape.default, add_call(graph, aten.div.Tensor, *means), [1])
    output.args = ((measure, *emitted),)


def specialize(captured: Captured, phase: Phase, anchor: float = 0.5) -> Variant:
    """Return the variant of `captured` that serves `phase`. `captured` is not changed.

    If the phase merges the guidance halves, `anchor` is the weight of the second half.
    The parameters are shared, not copied, and unused ones are left out.

    Raises:
        VerificationError: the rewritten graph is not a valid variant.
    """
    graph_module = copy_graph(graph_of(captured, phase))
    sites = sites_of(captured, phase)
    emitted = (
        *(Emission(site) for site in sites if site.kind in phase.emit),
        *(Emission(site, anchor) for site in sites if site.kind in phase.merge),
    )
    reused = tuple(site for site in sites if site.kind in phase.taken)
    measured = tuple(site for site in sites if site.kind == "measured" and phase.part == "head")
    if measured:
        emitted = (*emitted, *map(Emission, _state(captured, phase)))
    elif phase.part != "whole":
        reused = (*_state(captured, phase), *reused)

    results: dict[str, PassResult] = {}
    if emitted:
        results["emit"] = emit(graph_module, emitted)
    if measured:
        _return_measure(graph_module, measured[0], captured.out_spec.num_leaves)
    if reused:
        results["reuse"] = reuse(graph_module, reused)
    results["remove_identities"] = remove_identities(graph_module)
    results["remove_dead"] = remove_dead(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    logger.debug("specialize(%s): %s", phase.name, {name: result.changes for name, result in results.items()})

    program = flat_program(captured.program, graph_module)
    taken = program.graph_signature.user_inputs
    caches = {cache_input_name(site): site for site in (*measured, *reused)}
    variant = Variant(
        phase,
        program,
        inputs=tuple(name for name in taken if name not in caches),
        reused=tuple(caches[name] for name in taken if name in caches),
        emitted=emitted,
    )
    verify(variant, captured)
    return variant
