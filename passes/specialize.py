"""Make the graph of one phase out of a captured denoiser: the driver of the passes."""

from __future__ import annotations

import logging

from tgate_compile._graphs import Captured, Emission, Variant
from tgate_compile._schedule import Phase
from tgate_compile.passes._result import PassResult
from tgate_compile.passes.copy_graph import copy_graph
from tgate_compile.passes.emit import emit
from tgate_compile.passes.flat_program import flat_program
from tgate_compile.passes.remove_dead import remove_dead
from tgate_compile.passes.remove_identities import remove_identities
from tgate_compile.passes.reuse import cache_name, reuse
from tgate_compile.passes.verify import verify

logger = logging.getLogger(__name__)


def specialize(captured: Captured, phase: Phase, anchor: float = 0.5) -> Variant:
    """The variant of `captured` that serves `phase`; `captured` is left alone.

    Where the phase merges the guidance halves, `anchor` is the weight of the second half.
    The parameters are shared, never copied, and those that nothing uses any more are not part of the result.

    Raises:
        VerificationError: the rewritten graph is not a valid variant.
    """
    graph_module = copy_graph(captured.program.graph_module)
    emitted = (
        *(Emission(site) for site in captured.sites if site.kind in phase.emit),
        *(Emission(site, anchor) for site in captured.sites if site.kind in phase.merge),
    )
    reused = tuple(site for site in captured.sites if site.kind in phase.reuse)

    results: dict[str, PassResult] = {}
    if emitted:
        results["emit"] = emit(graph_module, emitted)
    if reused:
        results["reuse"] = reuse(graph_module, reused)
    results["remove_identities"] = remove_identities(graph_module)
    results["remove_dead"] = remove_dead(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    logger.debug("specialize(%s): %s", phase.name, {name: result.changes for name, result in results.items()})

    program = flat_program(captured.program, graph_module)
    taken = program.graph_signature.user_inputs
    caches = {cache_name(site): site for site in reused}
    variant = Variant(
        phase,
        program,
        inputs=tuple(name for name in taken if name not in caches),
        reused=tuple(caches[name] for name in taken if name in caches),
        emitted=emitted,
    )
    verify(variant, captured)
    return variant
