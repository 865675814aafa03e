"""The gate that the convergence of the cross-attentions suggests."""

from __future__ import annotations

from tgate_compile._analysis.curves import Curve

#: What counts as converged: the fraction of the way from the smallest change up to the largest.
CONVERGED_WITHIN = 0.1


def suggested_gate(difference: Curve, converged_within: float) -> int | None:
    """The first step from which on the mean change stays close to its floor, within a fraction `converged_within` of
    the way from its smallest value to its largest. None if it never does.

    The cache of gate g is taken at step g-1, so that the changes at the steps g, g+1, ... are those that it leaves out.

    Source: the way in which arXiv 2404.02747 v1 reads its figure 2: the curve falls in the first 5 to 10 of 25 steps,
    then is flat. The paper gives no rule. The floor is not zero where steps are long, so it is not taken to be.
    """
    if not difference.mean:
        return None
    floor, peak = min(difference.mean), max(difference.mean)
    limit = floor + converged_within * (peak - floor)
    gate = None
    for step, mean in zip(reversed(difference.steps), reversed(difference.mean), strict=True):
        if mean > limit:
            break
        gate = step
    return gate
