"""Observe a scheduler during a generation: calls of its `set_timesteps` and `step`.

The pipeline's call of `scheduler.step(prediction, timestep, sample)` is the most reliable information about a denoising
loop: it shows that a step is complete, how many latents there are, and how the two predictions of guidance were
combined.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


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
