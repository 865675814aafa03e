"""Whether the batches of a pass hold two guidance halves: learnt from what the scheduler steps, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._errors import INSTEAD, UnsupportedModelError
from tgate_compile.engine.families import Family
from tgate_compile.engine.halves import MSG_NOT_TWO_HALVES, are_halves, are_two_of_each, first_is_cond
from tgate_compile.pipeline.caches import batch_ratio
from tgate_compile.pipeline.loop import Loop

MSG_PREDICTIONS = (
    "The denoiser's batch of {rows} is {ratio} times the {latents} latents that {scheduler} steps, but {expected}. "
    "Tiles of the latents, and guidance by more than two predictions (several prompts composed, edits, perturbed "
    "attention), cannot be gated. " + INSTEAD
)

MSG_NO_STEP = (
    "The denoiser's batch of {rows} may be the two halves of guidance or {rows} images, and this pipeline does not "
    "call its scheduler's step(), which would tell. If this is a loop of your own, run it in "
    "tgate_compile.generation(pipe, guidance=...). " + INSTEAD
)


@dataclass(frozen=True)
class Learnt:
    """What the first step of a pass has shown about a batch that is two halves.

    Attributes:
        first_is_cond: its first half is the prompt's, by the arithmetic of the prediction that was stepped.
        served: it was taken for two halves already when it ran.
    """

    first_is_cond: bool
    served: bool


class TwoHalves:
    """What one pass over the timesteps shows about its batches, where the pipeline's own word is not enough.

    Args:
        loop: the loop that makes the pass.
        family: what is specific to the pipeline's class.
        scheduler: returns the pipeline's scheduler.
    """

    def __init__(self, loop: Loop, family: Family, scheduler: Callable[[], Any]) -> None:
        self._loop = loop
        self._family = family
        self._scheduler = scheduler
        #: Guidance is said to be on, but the batch is not two halves of the same latents.
        self.undecided = False
        #: What the pipeline said about guidance at the last denoiser call.
        self.said = False
        self._has_halves: bool | None = None  # the denoiser's batch is twice the scheduler's; None: not seen yet
        self._batch = self._batch_before = torch.Size()  # the latents of the last denoiser call, and the one before
        self._served = False  # whether that call was taken for two halves
        self._sample: torch.Size | None = None  # the latents that the scheduler stepped last
        self._first_latents: torch.Tensor | None = None  # of the pass, until the scheduler has stepped
        self._predictions: torch.Tensor | None = None  # of the first guided step, likewise
        self._merged = False  # a cache of this pass is a mean of halves

    def begin(self, latents: torch.Tensor) -> None:
        """Look at the first batch of a pass that is said to be guided.

        Raises:
            UnsupportedModelError: it is not two halves, and no step of a scheduler will show what it is.
        """
        if are_halves(latents, same=self._family.only is None):
            return
        if not (self._loop.is_pipeline and self._loop.observable):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        self.undecided = True

    def see(self, latents: torch.Size, said: bool) -> None:
        """Note the latents of a denoiser call, and what the pipeline says about guidance."""
        self._batch_before, self._batch = self._batch, latents
        self._served = self.said = said

    def served(self, latents: torch.Tensor, guided: bool, *, first: bool) -> bool:
        """Return whether to run a batch as two halves; `first`: no step of the pass has run yet.

        Raises:
            UnsupportedModelError: it has changed its size to something else than one or two of each latent.
        """
        if self._has_halves is None:
            self._first_latents = latents if guided or first else None
            guided = guided and not self.undecided
        elif latents.shape == self._batch_before:
            guided = self._has_halves
        else:
            guided = self._is_guided_now(latents)
        self._served = guided
        return guided

    def ran(self, prediction: torch.Tensor, *, merged: bool) -> None:
        """Note what the denoiser has predicted, and whether a cache was merged from both halves."""
        self._merged = self._merged or merged
        if self._first_latents is not None and not self._loop.knows_order:
            self._predictions = prediction

    def _is_guided_now(self, latents: torch.Tensor) -> bool:
        """Whether a batch has both halves that is not of the size of the last one: guidance begins or ends here."""
        assert self._sample is not None
        ratio = batch_ratio(latents.shape, self._sample)
        if ratio not in (1, 2):
            raise UnsupportedModelError(self._wrong_batch(self._sample, "one or two predictions were expected"))
        self._has_halves = ratio == 2
        if self._has_halves and not are_halves(latents, same=self._family.only is None):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        return self._has_halves

    def compare(self, prediction: torch.Tensor, sample: torch.Tensor) -> Learnt | None:
        """Compare the last batch with what the scheduler steps: as many latents, or half as many.

        Returns what the first step of the pass shows, if its batch turns out to be two halves.

        Raises:
            UnsupportedModelError: neither, or not what the pipeline says about guidance.
        """
        latents, self._first_latents = self._first_latents, None
        predictions, self._predictions = self._predictions, None
        ratio = batch_ratio(self._batch, sample.shape)
        self._sample = sample.shape
        if ratio == 2 and (self.said or self._served or not self._loop.knows_guidance):
            if latents is not None:
                return self._learn(latents, predictions, prediction)
            if not self._served:
                raise UnsupportedModelError(self._wrong_batch(sample.shape, "as many were expected"))
        elif ratio == 1:
            # The scale is given to the denoiser as a number, or there is no guidance at all.
            if self._served and (self._merged or latents is None):
                raise UnsupportedModelError(self._wrong_batch(sample.shape, "two halves were expected"))
            self._has_halves = False
        else:
            expected = "twice as many were expected" if self.said else "as many were expected, since guidance is off"
            raise UnsupportedModelError(self._wrong_batch(sample.shape, expected))
        return None

    def _learn(self, latents: torch.Tensor, predictions: torch.Tensor | None, prediction: torch.Tensor) -> Learnt:
        if not are_halves(latents, same=self._family.only is None):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        self._has_halves = True
        cond_first = not self._loop.knows_order and predictions is not None and first_is_cond(predictions, prediction)
        return Learnt(cond_first, self._served)

    def check_unseen(self) -> None:
        """After the first step of a loop that has not stepped its scheduler, so that only the latents can tell.

        Raises:
            UnsupportedModelError: they are not two of each.
        """
        if self._has_halves is not None:
            return
        latents, self._first_latents = self._first_latents, None
        if self._loop.is_pipeline and latents is not None and self.said and not are_two_of_each(latents):
            raise UnsupportedModelError(MSG_NO_STEP.format(rows=latents.shape[0]))

    def free(self) -> None:
        """Let go of the tensors."""
        self._first_latents = self._predictions = None

    def _wrong_batch(self, sample: torch.Size, expected: str) -> str:
        rows, latents = self._batch[0], sample[0]
        return MSG_PREDICTIONS.format(
            rows=rows,
            ratio=f"{rows / latents:g}",
            latents=latents,
            scheduler=type(self._scheduler()).__name__,
            expected=expected,
        )
