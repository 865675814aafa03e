"""What a valid variant is."""

from __future__ import annotations

from collections.abc import Collection

from tgate_compile._errors import VerificationError
from tgate_compile._graphs import Captured, Variant
from tgate_compile.passes.find_attention import find_attention
from tgate_compile.passes.module_region import is_inside
from tgate_compile.passes.operands import is_mutable, outputs_of


def verify(variant: Variant, captured: Captured) -> None:
    """Check that `variant` is a valid graph of its phase, made of `captured`.

    - It returns what the denoiser returns, then one value for each emission: batch B when it is merged, else the
      site's own shape.
    - It takes one cache for each reused site; no attention of a reused kind is left, and no weight of one.
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
    reused = {site.name for site in captured.sites if site.kind in variant.phase.reuse and site.kind != "deep"}
    latents = next(node for node in graph.nodes if node.name == captured.latents)
    attention = find_attention(variant.program.graph_module, latents, variant.phase.reuse)
    left = [site.name for site in attention if site.name in reused]
    _require(not left, f"{len(left)} attentions are left that are reused: {left}")
    weights = set(variant.weights) & _own_weights(captured, reused)
    _require(not weights, f"weights of cached attentions are left: {sorted(weights)}")


def _own_weights(captured: Captured, modules: Collection[str]) -> set[str]:
    """The parameters that only these modules' own computations use (others may borrow a layer of theirs)."""
    parameters = captured.program.graph_signature.inputs_to_parameters
    return {
        parameters[node.name]
        for node in captured.program.graph.nodes
        if node.op == "placeholder" and node.name in parameters and node.users
        and any(all(is_inside(user, path) for user in node.users) for path in modules)
    }  # fmt: skip


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise VerificationError(f"A rewritten graph is not valid: {problem}. Please report this.")
