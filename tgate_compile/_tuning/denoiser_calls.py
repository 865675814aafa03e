"""Which step, and which guidance half, the denoiser calls of a plain generation belong to."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import DiffusionPipeline

from tgate_compile._families import family_of
from tgate_compile._schedule import Half
from tgate_compile._steps import StepCounter


class DenoiserCalls:
    """Counts the denoiser calls of one generation, of both denoisers where there are two.

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call: whether guidance is on.
    """

    def __init__(self, pipe: DiffusionPipeline, guided: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._order = family_of(type(pipe)).order
        self._separate = family_of(type(pipe)).calls
        self._guided = guided
        self._counter: StepCounter | None = None
        self._calls = 0

    def next(self) -> tuple[int, tuple[Half, ...]]:
        """The step of the next call, and the halves in its batch, in their order; none if guidance is off."""
        if self._counter is None:
            self._counter = StepCounter.of(self._pipe.scheduler, None)  # the timesteps are set by now
        guided = self._guided()
        per_timestep = max(1, len(self._separate)) if guided else 1
        timestep, part = divmod(self._calls, per_timestep)
        self._calls += 1
        halves: tuple[Half, ...] = ()
        if guided:
            halves = (self._separate[part],) if self._separate else self._order
        return self._counter.step(timestep), halves
