"""How often a generation changes graphs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

from tgate_compile._bundle.manifest import Manifest

logger = logging.getLogger(__name__)

MSG_ALTERNATES = (
    "With this schedule a generation of %d steps opens a graph %d times if there is one open at a time "
    "(sequential=True), which takes longer than a step. A schedule that changes once, as T-GATE v1, has no such cost."
)


def openings(graphs: Sequence[str]) -> int:
    """How often a graph is opened in steps that run these, if only the last one stays open."""
    return len(graphs[:1]) + sum(one != other for one, other in pairwise(graphs))


def warn_of_alternation(manifest: Manifest) -> None:
    """Log a warning if the schedule comes back to a graph that it has left."""
    steps = [step.graph for step in manifest.example.steps]
    if openings(steps) > len(set(steps)):
        logger.warning(MSG_ALTERNATES, len(steps), openings(steps))
