"""Watch what a pipeline's scheduler steps.

It tells whether batches hold two guidance halves, and which tokens are those of reference images.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tgate_compile._errors import INSTEAD, UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.families import Family
from tgate_compile.engine.halves import (
    MSG_NOT_TWO_HALVES,
    are_halves,
    are_two_of_each,
    first_is_cond,
    latents_of,
    similarity,
    timestep_of,
)
from tgate_compile.methods.method import Half, Phase
from tgate_compile.pipeline.caches import batch_ratio
from tgate_compile.pipeline.loop import Loop

logger = logging.getLogger(__name__)


class SchedulerObserver(Protocol):
    """Receives notifications about one scheduler."""

    def on_set_timesteps(self) -> None:
        """Called before the timesteps are set."""
        ...

    def on_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Called before a step, with the denoiser's `prediction` after guidance, and the latents `sample`."""
        ...


_OBSERVED = "_tgate_compile_observed"

_observers: dict[int, list[SchedulerObserver]] = {}
_lock = threading.Lock()


@contextmanager
def observed(scheduler: Any, observer: SchedulerObserver) -> Iterator[bool]:
    """Report the calls of `scheduler` to `observer` inside the context; yield whether the object can be observed.

    The class of the object is replaced by a subclass with the same name, and restored at the end. Copies of the object
    are not observed.
    """
    scheduler = _stepping(scheduler)
    own_class = type(scheduler)
    with _lock:
        watched = _observers.get(id(scheduler))
        if watched is None:
            try:
                scheduler.__class__ = _observed_class(own_class)  # type: ignore[arg-type]
            except TypeError:  # a class with slots, or none at all
                observable = False
            else:
                watched = _observers[id(scheduler)] = []
        observable = watched is not None
        if watched is not None:
            watched.append(observer)
    try:
        yield observable
    finally:
        if watched is not None:
            with _lock:
                watched.remove(observer)
                if not watched:
                    del _observers[id(scheduler)]
                    if _OBSERVED in vars(type(scheduler)):  # else other code has replaced the class in the meantime
                        scheduler.__class__ = type(scheduler).__mro__[1]


def _stepping(scheduler: Any) -> Any:
    """Return the object that `scheduler.step` is bound to, which differs if `scheduler` is a forwarding wrapper."""
    if "step" in dir(type(scheduler)):
        return scheduler
    owner = getattr(getattr(scheduler, "step", None), "__self__", scheduler)
    return owner if hasattr(owner, "timesteps") else scheduler


@functools.cache
def _observed_class(scheduler_class: type) -> type:
    namespace: dict[str, Any] = {
        _OBSERVED: True,
        "__module__": scheduler_class.__module__,
        "__qualname__": scheduler_class.__qualname__,
        "__doc__": scheduler_class.__doc__,
    }
    if hasattr(scheduler_class, "set_timesteps"):
        namespace["set_timesteps"] = _reporting(scheduler_class.set_timesteps, _report_timesteps)
    if hasattr(scheduler_class, "step"):
        namespace["step"] = _reporting(scheduler_class.step, _reporter_of_steps(scheduler_class.step))

    if not hasattr(scheduler_class, "scale_model_input"):
        # Bria's pipeline scales the latents unless the scheduler is exactly of the class that has no such method.
        namespace["scale_model_input"] = lambda self, sample, timestep=None: sample

    def reduce(self: Any, protocol: Any) -> Any:
        """Give copies, which are not observed, the scheduler's original class."""
        reduced: Any = scheduler_class.__reduce_ex__
        made, arguments, *state = reduced(self, protocol)
        return (made, tuple(scheduler_class if each is observed_class else each for each in arguments), *state)

    namespace["__reduce_ex__"] = reduce
    observed_class = type(scheduler_class.__name__, (scheduler_class,), namespace)
    return observed_class


def _reporting(original: Callable[..., Any], report: Callable[..., None]) -> Callable[..., Any]:
    # `wraps`, since pipelines inspect the signature of `step` to find whether it takes `eta` and `generator`.
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for observer in tuple(_observers.get(id(self), ())):
            report(observer, self, args, kwargs)
        return original(self, *args, **kwargs)

    return call


def _report_timesteps(
    observer: SchedulerObserver, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    observer.on_set_timesteps()


def _reporter_of_steps(step: Callable[..., Any]) -> Callable[..., None]:
    signature = inspect.signature(step)

    def report(observer: SchedulerObserver, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            given = signature.bind(scheduler, *args, **kwargs).arguments
        except TypeError:
            return  # the call itself is about to fail, with a better message
        # Custom schedulers may use other names, but have them in this order.
        tensors = [value for value in given.values() if torch.is_tensor(value) and value.ndim > 1]
        prediction = given.get("model_output", tensors[0] if tensors else None)
        sample = given.get("sample", tensors[1] if len(tensors) > 1 else None)
        if torch.is_tensor(prediction) and torch.is_tensor(sample):
            observer.on_step(prediction, sample)

    return report


MSG_PREDICTIONS = (
    "The denoiser's batch of {rows} is {ratio} times the {latents} latents that {scheduler} steps, but {expected}. "
    "Tiles of the latents, and guidance with more than two predictions (several prompts composed, edits, perturbed "
    "attention), cannot be gated. " + INSTEAD
)

MSG_NO_STEP = (
    "The denoiser's batch of {rows} may be the two halves of guidance or {rows} images. They cannot be distinguished, "
    "because this pipeline does not call its scheduler's step(). If this is your own loop, run it in "
    "tgate_compile.generation(pipe, guidance=...). " + INSTEAD
)


@dataclass(frozen=True)
class Learnt:
    """The information from the first step of a pass about a batch that consists of two halves.

    Attributes:
        first_is_cond: whether the first half belongs to the prompt, as computed from the guided prediction.
        served: whether the batch was already treated as two halves when it ran.
    """

    first_is_cond: bool
    served: bool


class TwoHalves:
    """Tracks whether the batches of one pass over the timesteps are two halves, whatever the pipeline reports.

    Args:
        loop: the loop that the pass belongs to.
        family: the properties of the pipeline's class.
        scheduler: returns the pipeline's scheduler.
    """

    def __init__(self, loop: Loop, family: Family, scheduler: Callable[[], Any]) -> None:
        self._loop = loop
        self._family = family
        self._scheduler = scheduler
        #: Whether guidance is reported to be on, although the batch is not two halves of the same latents.
        self.undecided = False
        #: Whether the pipeline reported guidance to be on at the last denoiser call.
        self.reported_guided = False
        # Whether the denoiser's batch is twice the scheduler's; None before the first step.
        self._has_halves: bool | None = None
        # The shapes of the latents in the last denoiser call, and in the one before.
        self._batch = self._batch_before = torch.Size()
        self._served = False  # whether the last denoiser call was treated as two halves
        self._sample: torch.Size | None = None  # the shape of the latents that the scheduler stepped last
        self._first_latents: torch.Tensor | None = None  # the first latents of the pass, until the scheduler steps
        self._predictions: torch.Tensor | None = None  # the predictions for them, until the scheduler steps
        self._predicted: tuple[torch.Tensor, torch.Tensor, torch.Size] | None = None  # until the scheduler steps
        self._merged = False  # whether a cache of this pass is a mean of halves

    def begin(self, latents: torch.Tensor) -> None:
        """Check the first batch of a pass that the pipeline reports to be guided.

        Raises:
            UnsupportedModelError: it is not two halves, and no step of the scheduler will be observed to decide.
        """
        if are_halves(latents, same=self._family.only is None):
            return
        if not (self._loop.is_pipeline and self._loop.observable):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        self.undecided = True

    def see(self, latents: torch.Size, guided: bool) -> None:
        """Note the shape of the latents of a denoiser call, and whether the pipeline reports guidance to be on."""
        self._batch_before, self._batch = self._batch, latents
        self._served = self.reported_guided = guided

    def served(self, latents: torch.Tensor, guided: bool, *, first: bool) -> bool:
        """Return whether to run a batch as two halves; `first` means that no step of the pass has run yet.

        Raises:
            UnsupportedModelError: the batch has a new size, which is not one or two rows for each latent.
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
        """Note the denoiser's prediction, and whether a cache was merged from both halves."""
        self._merged = self._merged or merged
        if self._first_latents is not None and not self._loop.knows_order:
            self._predictions = prediction

    def _is_guided_now(self, latents: torch.Tensor) -> bool:
        """Return whether a batch of a new size has both halves: guidance begins or ends at this call."""
        assert self._sample is not None
        ratio = batch_ratio(latents.shape, self._sample)
        if ratio not in (1, 2):
            raise UnsupportedModelError(self._wrong_batch(self._sample, "one or two predictions were expected"))
        self._has_halves = ratio == 2
        if self._has_halves and not are_halves(latents, same=self._family.only is None):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        return self._has_halves

    def compare(self, prediction: torch.Tensor, sample: torch.Tensor) -> Learnt | None:
        """Check that the scheduler steps as many latents as the last batch has, or half as many.

        Returns:
            The information from the first step of the pass, if its batch turns out to be two halves; else None.

        Raises:
            UnsupportedModelError: the numbers do not fit, or contradict what the pipeline reports about guidance.
        """
        latents, self._first_latents = self._first_latents, None
        predictions, self._predictions = self._predictions, None
        ratio = batch_ratio(self._batch, sample.shape)
        self._sample = sample.shape
        if ratio == 2 and (self.reported_guided or self._served or not self._loop.knows_guidance):
            if latents is not None:
                return self._learn(latents, predictions, prediction)
            if not self._served:
                raise UnsupportedModelError(self._wrong_batch(sample.shape, "as many were expected"))
        elif ratio == 1:
            # The denoiser takes the guidance scale as an input, or guidance is off.
            if self._served and (self._merged or latents is None):
                raise UnsupportedModelError(self._wrong_batch(sample.shape, "two halves were expected"))
            self._has_halves = False
        else:
            off = "as many were expected, since guidance is off"
            expected = "twice as many were expected" if self.reported_guided else off
            raise UnsupportedModelError(self._wrong_batch(sample.shape, expected))
        return None

    def _learn(self, latents: torch.Tensor, predictions: torch.Tensor | None, prediction: torch.Tensor) -> Learnt:
        if not are_halves(latents, same=self._family.only is None):
            raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))
        self._has_halves = True
        cond_first = not self._loop.knows_order and predictions is not None and first_is_cond(predictions, prediction)
        return Learnt(cond_first, self._served)

    def predicted(self, uncond: torch.Tensor, cond: torch.Tensor, latents: torch.Size) -> None:
        """Note the predictions of a guided step for latents of this shape."""
        self._predicted = uncond, cond, latents

    def likeness(self, sample: torch.Size | None) -> float | None:
        """Return the similarity of the predictions of the last guided step; None if it is known, or there are none.

        `sample` is the shape of the latents that the scheduler steps; None if it has not stepped since.
        """
        if self._predicted is None:
            return None
        (uncond, cond, latents), self._predicted = self._predicted, None
        shape = sample if sample is not None and len(sample) == cond.ndim else latents
        return similarity(uncond, cond, shape, last_tokens=self._family.last_tokens)

    def check_unseen(self) -> None:
        """Check the first batch of a loop that has not stepped its scheduler, where only the latents can decide.

        Raises:
            UnsupportedModelError: it is not certain that the batch has two rows for each latent.
        """
        if self._has_halves is not None:
            return
        latents, self._first_latents = self._first_latents, None
        if latents is None or not (self._loop.is_pipeline and self.reported_guided):
            return
        if not are_two_of_each(latents):
            raise UnsupportedModelError(MSG_NO_STEP.format(rows=latents.shape[0]))

    def free(self) -> None:
        """Release the tensors."""
        self._first_latents = self._predictions = self._predicted = None

    def _wrong_batch(self, sample: torch.Size, expected: str) -> str:
        rows, latents = self._batch[0], sample[0]
        return MSG_PREDICTIONS.format(
            rows=rows,
            ratio=f"{rows / latents:g}",
            latents=latents,
            scheduler=type(self._scheduler()).__name__,
            expected=expected,
        )


MSG_TWO_CALLS = (
    "The denoiser was called twice for one timestep before {scheduler} stepped: this pipeline denoises its latents in "
    "tiles, or evaluates its guidance halves in separate calls of unknown order, or its guidance needs more than two "
    "predictions. " + INSTEAD
)
MSG_NEVER_GUIDED = (
    "Guidance begins at step {step}, but the schedule ({schedule}) has already ended it, so it would never act. Make "
    "guidance begin earlier or end later."
)
MSG_ORDER_AND_ANCHOR = (
    "This pipeline's batch has the prompt's half first, which became known only after the first step, and "
    "anchor_weight depends on the order. Leave anchor_weight at 0.5, or use a pipeline class of diffusers."
)
MSG_NO_PAIR = (
    "Guidance is on, and pipelines of this kind evaluate the guidance halves in separate calls, {first} then {second}, "
    "but the second call is for another timestep or has other shapes. " + INSTEAD
)
MSG_NO_REFERENCES = (
    "The latents of %s have no tokens of reference images, so FrozenReferences freezes nothing. Either this call has "
    "no reference image, or the denoiser does not take it as further tokens of the latents."
)
MSG_WHERE_ARE_REFERENCES = (
    "The denoiser's latents have {tokens} tokens, and the scheduler steps {stepped}, but these are neither the first "
    "nor the last ones, so the reference images cannot be told from the image. " + INSTEAD
)
MSG_NO_STEP_SEEN = (
    "Which tokens belong to reference images is known once the scheduler's step() has been called, but it has not been "
    "called before the first step that reuses them. " + INSTEAD
)

#: The number of shapes of calls whose rows are kept.
MOST_KNOWN = 256
#: The rows of the latents that are the image's (`Call.image`); None if all of them are.
Rows = tuple[int, int, int] | None


class ReferenceRows:
    """Learns which rows of the latents belong to reference images: those that the scheduler does not step.

    Until the scheduler has stepped for the first time they are unknown, unless another generation with inputs of the
    same shapes has learnt them.

    Args:
        known: the rows of the image by the key of a call, shared by the generations of a denoiser; None if references
            are not handled apart.
        model: the name of the denoiser in messages.
    """

    def __init__(self, known: dict[Hashable, Rows] | None, model: str) -> None:
        self._known = known
        self._model = model
        self._seen: dict[Hashable, torch.Tensor] = {}  # the latents of the first step, by the key of its calls
        self._is_sure = False
        #: The calls whose references are to be cached, each with its step and phase, by the half.
        self.kept: dict[Half | None, tuple[int, Phase, Call]] = {}

    def begin(self) -> None:
        """Forget what belongs to a pass over the timesteps."""
        self._seen.clear()
        self.kept.clear()
        self._is_sure = False

    def knows(self, call: Call) -> bool:
        """Return whether the rows of `call` are known, or do not matter."""
        return self._known is None or call.image is not None or self._is_sure or call.key in self._known

    def placed(self, call: Call, latents: torch.Tensor) -> Call:
        """Return `call`, whose latents are given, with the rows of the image if they are known."""
        if self._known is None:
            return call
        if not self._is_sure:
            self._seen[call.key] = latents
        return replace(call, image=self._known.get(call.key))

    def known(self, call: Call) -> Call:
        """Return `call` with the rows of the image, which are known."""
        assert self._known is not None
        return replace(call, image=self._known.get(replace(call, image=None).key))

    def learn(self, sample: torch.Tensor) -> bool:
        """Learn from the first `sample` that the scheduler steps; return whether it corrects what was known.

        Raises:
            UnsupportedModelError: it does not show which rows are the image's.
        """
        if self._known is None or self._is_sure or not self._seen:
            return False
        before = {key: self._known[key] for key in self._seen if key in self._known}
        found = {key: self._rows_of(latents, sample) for key, latents in self._seen.items()}
        if all(rows is None for rows in found.values()) and found.keys() - before.keys():
            logger.warning(MSG_NO_REFERENCES, self._model)
        self._known.update(found)
        for key in list(self._known)[:-MOST_KNOWN]:
            del self._known[key]  # a further call of this shape learns it again
        self._seen.clear()
        self._is_sure = True
        return any(found[key] != rows for key, rows in before.items())

    def _rows_of(self, latents: torch.Tensor, sample: torch.Tensor) -> Rows:
        tokens, stepped = latents.shape[1], sample.shape[1]
        if not latents.ndim == sample.ndim == 3 or latents.shape[2] != sample.shape[2] or tokens <= stepped:
            return None
        rows, own = latents[: len(sample)], sample.to(latents)
        for start in (0, tokens - stepped):
            if torch.equal(rows[:, start : start + stepped], own):
                return 1, start, start + stepped
        raise UnsupportedModelError(MSG_WHERE_ARE_REFERENCES.format(tokens=tokens, stepped=stepped))


def check_pair(first: dict[str, Any], second: dict[str, Any], calls: Sequence[Half], *, values: bool) -> None:
    """Check that two calls are the halves of one timestep; `values` also compares their timesteps.

    Raises:
        UnsupportedModelError: they are not.
    """
    same = latents_of(first).shape == latents_of(second).shape
    if same and values and timestep_of(first) is not None:
        same = torch.equal(torch.as_tensor(timestep_of(first)), torch.as_tensor(timestep_of(second)))
    if not same:
        raise UnsupportedModelError(MSG_NO_PAIR.format(first=calls[0], second=calls[1]))


def copied(output: Any) -> Any:
    """Return a copy of one of the values that a denoiser returns."""
    return output.clone() if torch.is_tensor(output) else output  # a denoiser may return None for a missing modality
