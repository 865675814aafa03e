"""What a valid variant is."""

from __future__ import annotations

from torch.export.graph_signature import InputKind

from tgate_compile._errors import VerificationError
from tgate_compile._graphs import Captured, Variant
from tgate_compile.passes.attention_core import attention_cores
from tgate_compile.passes.operands import is_mutable, outputs_of


def verify(variant: Variant, captured: Captured) -> None:
    """Check that `variant` is a valid graph of its phase, made of `captured`.

    - It returns what the denoiser returns, then one value for each emission: batch B when it is merged, else the
      site's own shape.
    - It takes one cache for each reused site; no attention or weight is left that only cached values need.
    - Every value has its `meta["val"]`, and nothing works in place.
    - No output is an input, and no two outputs are the same value.

    Raises:
        VerificationError: it is not; the message says in what.
    """
    graph = variant.program.graph
    outputs = outputs_of(graph)
    expected = captured.out_spec.num_leaves + len(variant.emitted)
    _require(len(outputs) == expected, f"it has {len(outputs)} outputs, expected {expected}")
    _require(len(set(outputs)) == len(outputs), "one value is two of its outputs")
    _require(all(node.op != "placeholder" for node in outputs), "one of its outputs is an input")
    for node in graph.nodes:
        _require(node.op == "output" or "val" in node.meta, f"{node.name} has no meta['val']")
        _require(not is_mutable(node), f"{node.name} works in place, and could be lost as dead code")

    for emission, node in zip(variant.emitted, outputs[captured.out_spec.num_leaves :], strict=True):
        site = emission.site
        shape = (site.shape[0] // 2, *site.shape[1:]) if emission.merged else site.shape
        _require(tuple(node.meta["val"].shape) == shape, f"{site.name} is emitted as {node.meta['val'].shape}")
        _require(node.meta["val"].dtype == site.cache_dtype, f"{site.name} is emitted as {node.meta['val'].dtype}")

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
    """The names of the captured graph's nodes that are needed if the values of the reused sites are given."""
    given = {site.node for site in captured.sites if site.kind in variant.phase.reuse}
    nodes = {node.name: node for node in captured.program.graph.nodes}
    wanted = [*outputs_of(captured.program.graph), *(nodes[emission.site.node] for emission in variant.emitted)]
    needed = set(wanted)
    for node in wanted:  # which grows
        new = [] if node.name in given else [source for source in node.all_input_nodes if source not in needed]
        needed.update(new)
        wanted += new
    return {node.name for node in needed}


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise VerificationError(f"A rewritten graph is not valid: {problem}. Please report this.")
