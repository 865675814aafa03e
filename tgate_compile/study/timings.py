"""Decide which measured times are reliable enough to report, on machines that may be busy with other work."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

#: How far the median of several times may exceed the shortest, as a fraction of the shortest. Beyond that, most of the
#: runs were disturbed.
MOST_SPREAD = 0.25
#: The largest credible speedup of a schedule over the plain pipeline on the same backend, relative to the saving in
#: counted operations. It exceeds 1 because a schedule also saves operations that are not counted (the matrix products
#: inside attention, elementwise operations) and fixed costs per step.
MOST_GAIN = 2.0
#: The same if the backend itself is also faster than the plain pipeline.
MOST_GAIN_OF_BACKEND = 8.0

MSG_SPREAD = "{whose} times range from {least:.3g} s to {most:.3g} s, with a median of {median:.3g} s"
MSG_GAIN = (
    "{speedup:.2f} times as fast at {cost:.2f} of the operations is more than the saved operations can explain; "
    "something else must have slowed the plain pipeline down"
)


def spread_of(seconds: Sequence[float]) -> float | None:
    """Return how far the median of `seconds` exceeds the shortest, as a fraction of it; None for fewer than two."""
    return median(seconds) / min(seconds) - 1 if len(seconds) > 1 else None


def why_unreliable(
    seconds: Sequence[float],
    reference: Sequence[float],
    *,
    speedup: float | None = None,
    cost: float | None = None,
    most_gain: float = MOST_GAIN,
) -> str | None:
    """Return why a comparison of `seconds` with `reference` is unreliable; None if it is reliable.

    Args:
        seconds: times of several runs of the same work.
        reference: times to compare with.
        speedup: time of the reference divided by the time of this work.
        cost: operations of this work divided by those of the reference.
        most_gain: the largest credible value of `speedup * cost`.
    """
    for whose, times in (("its", seconds), ("the plain pipeline's", reference)):
        spread = spread_of(times)
        if spread is not None and spread > MOST_SPREAD:
            return MSG_SPREAD.format(whose=whose, least=min(times), most=max(times), median=median(times))
    if speedup is not None and cost is not None and speedup * cost > most_gain:
        return MSG_GAIN.format(speedup=speedup, cost=cost)
    return None
