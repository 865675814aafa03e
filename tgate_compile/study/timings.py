"""Times of generations on machines that do other work too: which of them to print as results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

#: How far the median of several times may lie above the least of them, as a share of the least: more means that most of
#: them were disturbed.
MOST_SPREAD = 0.25
#: How much more time than operations a schedule may save over the plain pipeline on the same backend. It also saves
#: operations that are not counted (attention's own products, elementwise ones), and a step's fixed costs.
MOST_GAIN = 2.0
#: The same where the backend is faster than the plain pipeline's, too.
MOST_GAIN_OF_BACKEND = 8.0

MSG_SPREAD = "{whose} times range from {least:.3g} s to {most:.3g} s, with a median of {median:.3g} s"
MSG_GAIN = (
    "{speedup:.2f} times as fast at {cost:.2f} of the operations is more than these can explain: something else must "
    "have slowed the plain pipeline down"
)


def spread_of(seconds: Sequence[float]) -> float | None:
    """How far the median of `seconds` lies above the least of them, as a share of it; None: too few to tell."""
    return median(seconds) / min(seconds) - 1 if len(seconds) > 1 else None


def why_unreliable(
    seconds: Sequence[float],
    reference: Sequence[float],
    *,
    speedup: float | None = None,
    cost: float | None = None,
    most_gain: float = MOST_GAIN,
) -> str | None:
    """Why a comparison of `seconds` with the `reference`'s should not be believed; None if nothing speaks against it.

    Args:
        seconds: of the same work, several times.
        reference: what they are compared with.
        speedup: the reference's time over this one's.
        cost: the operations over the reference's.
        most_gain: how large `speedup * cost` may be.
    """
    for whose, times in (("its", seconds), ("the plain pipeline's", reference)):
        spread = spread_of(times)
        if spread is not None and spread > MOST_SPREAD:
            return MSG_SPREAD.format(whose=whose, least=min(times), most=max(times), median=median(times))
    if speedup is not None and cost is not None and speedup * cost > most_gain:
        return MSG_GAIN.format(speedup=speedup, cost=cost)
    return None
