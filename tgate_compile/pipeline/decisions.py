"""Steps that are decided while they run: their parts, and the state of the decisions during a generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tgate_compile.engine.compiled import CachedValues, Runnable
from tgate_compile.methods.decisions import Decider, Rule
from tgate_compile.methods.method import DECIDED, MEASURED, Half, Phase
from tgate_compile.pipeline.caches import Caches

logger = logging.getLogger(__name__)

#: Runs the graph of a phase with cached values, and returns the graph, the denoiser's outputs, and the values emitted.
RunGraph = Callable[[Phase, CachedValues], tuple[Runnable, tuple[list[torch.Tensor], list[torch.Tensor]]]]


class Decisions:
    """The decisions of one pass over the timesteps.

    If a pipeline evaluates the guidance halves in two denoiser calls, each half is decided apart. Otherwise there is
    one decision for the whole batch.

    Args:
        rule: the rule by which steps are decided; None if all are known beforehand.
    """

    def __init__(self, rule: Rule | None) -> None:
        self._rule = rule
        self._deciders: dict[Half | None, Decider] = {}

    def begin(self) -> None:
        """Forget the decisions of an earlier pass."""
        self._deciders.clear()

    def computed(self, half: Half | None) -> None:
        """Note that a step that was not to be decided has been computed for a half, or for the batch (None)."""
        if half in self._deciders:
            self._deciders[half].computed()

    def run(
        self, step: int, phase: Phase, half: Half | None, caches: Caches, run: RunGraph
    ) -> tuple[Phase, Runnable, list[torch.Tensor]]:
        """Run a step of `phase`: the head, then the tail or the finish.

        Reading the measure is the only point at which the step waits for the device. Values for later steps are kept in
        `caches`.

        Returns:
            The phase as decided, the graph that ran last, and the denoiser's flat outputs.
        """
        assert self._rule is not None
        decider = self._deciders.setdefault(half, Decider(self._rule))
        own = phase if half is None else replace(phase, guided=False)
        given = caches.values(half, phase.reuse | MEASURED, step)
        head, ((measure,), emitted) = run(own.of_part("head"), given)
        change = float(measure)
        skipped = decider.skips(change)
        settled, computed = phase.settled(skipped=skipped), phase.settled(skipped=False)
        logger.debug("step %d: the measure is %.6g, blocks are %s", step, change, "skipped" if skipped else "computed")
        state: CachedValues = {
            (emission.site.kind, emission.site.name): value
            for emission, value in zip(head.emitted, emitted, strict=True)
            if emission.site.kind == "state"
        }
        given = {**caches.values(half, settled.reuse, step), **state}
        rest, (outputs, kept) = run(own.of_part("finish" if skipped else "tail"), given)
        if not skipped or self._rule.since == "previous":
            caches.keep(head.emitted, emitted, computed, half, step, MEASURED)
        if not skipped:
            caches.keep(rest.emitted, kept, computed, half, step, phase.decided)
        return settled, rest, outputs


def parts_of(phase: Phase, half: Half | None) -> list[Phase]:
    """Return the phases of the head, the tail and the finish of a step, or of its call for one half."""
    own = phase if half is None else replace(phase, guided=False)
    return [own.of_part(part) for part in ("head", "tail", "finish")]


def strip_of(steps: Sequence[tuple[int, Phase]]) -> str:
    """Return one character for each step that ran.

    A step in which one denoiser call has skipped blocks, and another has not, has the letter of an undecided step.
    """
    phases: dict[int, Phase] = {}
    for step, phase in steps:
        before = phases.get(step, phase)
        mixed = replace(phase, reuse=before.reuse & phase.reuse, decided=before.reuse ^ phase.reuse)
        is_mixed = before.guided == phase.guided and (mixed.reuse, mixed.decided) in DECIDED
        phases[step] = mixed if is_mixed else phase
    return "".join(phase.character for phase in phases.values())
