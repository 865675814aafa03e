"""The progress of a generation: its steps, and its passes over the timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import INSTEAD, ConfigurationError, UnsupportedCallError, UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.halves import latents_of, named_leaves, timestep_of
from tgate_compile.methods.method import Phase


@dataclass(frozen=True)
class StepCounter:
    """Assigns denoiser calls to steps. A Heun step makes two calls, and PNDM's warm-up call is not a step.

    Attributes:
        warmup_calls: the number of additional calls at the start, which belong to step 0.
        calls_per_step: the number of calls per step, which is the scheduler's order.
        num_calls: the number of timesteps that the denoiser is called for.
        num_steps: the number of steps of the whole pass.
    """

    warmup_calls: int
    calls_per_step: int
    num_calls: int
    num_steps: int

    @classmethod
    def of(cls, scheduler: Any, num_calls: int | None) -> StepCounter:
        """Return a counter for `scheduler`, whose timesteps must be set.

        Args:
            scheduler: a diffusers scheduler.
            num_calls: the number of its timesteps that the loop visits (fewer than all for `strength < 1` or
                `denoising_end`); None means all.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise ConfigurationError(
                f"The scheduler {type(scheduler).__name__} has no timesteps yet, so the steps cannot be counted. Call "
                "its set_timesteps() before the first denoiser call of the generation."
            )
        order = int(getattr(scheduler, "order", 1))
        requested = getattr(scheduler, "num_inference_steps", None) or -(-len(timesteps) // order)
        # The rule of the pipelines (`num_warmup_steps`): calls beyond steps x order come first and are not steps. They
        # are for timesteps that are repeated (PNDM); SCM's additional timestep is the end of the last step.
        values = torch.as_tensor(timesteps).tolist()
        warmup = max(len(timesteps) - requested * order, 0) if len(set(values)) < len(values) else 0
        calls = len(timesteps) if num_calls is None else num_calls
        return cls(warmup, order, calls, max(-(-(calls - warmup) // order), 1))

    def step(self, call: int) -> int:
        """Return the step, from 0, of the denoiser call with index `call`, from 0."""
        return max(call - self.warmup_calls, 0) // self.calls_per_step


#: The role of a denoiser call: the first of a pass over the timesteps, the first of a later timestep of this pass, or
#: another call for the timestep of the last call.
Event = Literal["new pass", "next", "again"]


MSG_BETWEEN = (
    "The denoiser was called for other timesteps between two steps of {scheduler} (midpoints, or the loop's own "
    "solver), so it is not known which step a call belongs to. {instead}"
)


@dataclass
class _Timestep:
    """The timestep of a call: its index in the scheduler's tensor, or else its value (minimum, maximum)."""

    place: int | None
    value: tuple[float, ...] | None
    is_rounded: bool = False  # whether the value has less than single precision


class Progress:
    """Follows the denoiser calls of one generation.

    A new pass begins when the scheduler's timesteps have been set again, or when the loop returns to a timestep that it
    has visited. Nothing is read from the device as long as the calls' timesteps are views of the scheduler's.

    Args:
        steps_once: whether each step of the scheduler is known to advance the loop to the next timestep.
    """

    def __init__(self, *, steps_once: bool = False) -> None:
        self._steps_once = steps_once
        self.counter: StepCounter | None = None  # the counter of this pass
        self.done = 0  # the number of completed timesteps of this pass
        self.steps_before = 0  # the number of steps of earlier passes
        self.stepped = False  # whether the scheduler has stepped since the last call
        self.was_stepped = False  # whether the scheduler has stepped in this generation
        self._scheduler: Any = None
        self._scheduler_class: type | None = None
        self._timesteps: Any = None  # kept alive, so that no other tensor gets its address
        self._set_again = False
        self._repeats = False
        self._last: _Timestep | None = None
        self._visited: set[Any] = set()

    def on_set_timesteps(self) -> None:
        """Note that the scheduler's timesteps are set again."""
        self._set_again = True

    def on_step(self) -> None:
        """Note that the scheduler steps."""
        self.stepped = self.was_stepped = True

    def event(self, scheduler: Any, arguments: Mapping[str, Any]) -> Event:
        """Return the role of the denoiser call with these `arguments`.

        Raises:
            UnsupportedModelError: the call does not fit the calls before it.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        last, self._last = self._last, self._timestep(timesteps, arguments)
        stepped, self.stepped = self.stepped, False
        if scheduler is not self._scheduler or type(scheduler) is not self._scheduler_class:
            self.was_stepped = False  # the scheduler that has replaced it is not observed
        if self.counter is None or self._set_again:
            return self._new_pass(scheduler, timesteps)
        if not self._continues(timesteps, last, arguments) and not self._same_timesteps(timesteps):
            return self._new_pass(scheduler, timesteps)
        here = self._last
        if last is None or (here.place is None and here.value is None):
            return "next"  # nothing to compare; steps are counted
        if (here.place is None) != (last.place is None):
            if self.done >= self.counter.num_calls and not self._is_one(here):
                return "next"  # one call too many: `step` raises the error
            last, here = self._placed(last), self._placed(here)
            self._last = here
            assert last.place is not None
            self._visited.add(last.place)
        if here == last:
            return self._same(stepped)
        key = here.place if here.place is not None else here.value
        went_back = key in self._visited if here.place is None else key < max(self._visited)
        if went_back:
            return self._new_pass(scheduler, timesteps)
        if self.was_stepped and not stepped:
            raise UnsupportedModelError(MSG_BETWEEN.format(scheduler=type(self._scheduler).__name__, instead=INSTEAD))
        self._visited.add(key)
        return "next"

    def begin(self, num_calls: int | None) -> StepCounter:
        """Count the steps of the pass that begins with the present call.

        Args:
            num_calls: the number of the scheduler's timesteps that the denoiser is called for; None means all from the
                present one.
        """
        if self.counter is not None:
            self.steps_before += self.counter.step(max(self.done - 1, 0)) + 1
        if num_calls is None and self._last is not None and self._last.place is not None:
            num_calls = len(self._timesteps) - self._last.place
        self.counter = StepCounter.of(self._scheduler, num_calls)
        self.done = 0
        return self.counter

    def step(self) -> int:
        """Return the step, from 0, of the present call within its pass.

        Raises:
            UnsupportedModelError: there are more calls than timesteps.
        """
        assert self.counter is not None
        if self.done >= self.counter.num_calls:
            raise UnsupportedModelError(
                f"The denoiser was called for more timesteps than the {self.counter.num_calls} of this pass "
                f"({type(self._scheduler).__name__} has {len(self._timesteps)}), so it is not known which step this "
                "call belongs to. In your own loop, pass the number of timesteps that it visits: "
                f"tgate_compile.generation(pipe, guidance=..., num_timesteps=...). {INSTEAD}"
            )
        return self.counter.step(self.done)

    def _new_pass(self, scheduler: Any, timesteps: Any) -> Event:
        self._scheduler, self._scheduler_class, self._timesteps = scheduler, type(scheduler), timesteps
        self._set_again = False
        values = torch.as_tensor(timesteps).tolist() if timesteps is not None else []
        self._repeats = len(set(values)) < len(values)  # second-order schedulers repeat timesteps
        assert self._last is not None
        key = self._last.place if self._last.place is not None else self._last.value
        self._visited = {key}
        return "new pass"

    def _continues(self, timesteps: Any, last: _Timestep | None, arguments: Mapping[str, Any]) -> bool:
        """Return whether the loop continues with the timesteps that it began with, although the scheduler has others.

        A callback may have replaced the scheduler, or the scheduler may drop the timesteps that are completed.
        """
        if timesteps is self._timesteps or last is None or last.place is None:
            return False
        here = self._timestep(self._timesteps, arguments)
        if here.place is None or here.place < last.place:
            return False
        self._last = here
        return True

    def _placed(self, timestep: _Timestep) -> _Timestep:
        """Return `timestep` as an index into the scheduler's timesteps, which must include it."""
        if timestep.place is not None:
            return timestep
        if not self._is_one(timestep):
            raise UnsupportedModelError(MSG_BETWEEN.format(scheduler=type(self._scheduler).__name__, instead=INSTEAD))
        assert timestep.value is not None
        return _Timestep(torch.as_tensor(self._timesteps).tolist().index(timestep.value[0]), None)

    def _is_one(self, timestep: _Timestep) -> bool:
        """Return whether `timestep` is one of the scheduler's timesteps."""
        if timestep.place is not None:
            return True
        values = torch.as_tensor(self._timesteps).tolist()
        return timestep.value is not None and timestep.value[0] == timestep.value[-1] and timestep.value[0] in values

    def _same_timesteps(self, timesteps: Any) -> bool:
        """Return whether `timesteps` are those of this pass, or a copy (some schedulers move theirs to a device)."""
        if timesteps is self._timesteps:
            return True
        if not (torch.is_tensor(timesteps) and torch.is_tensor(self._timesteps)):
            return False
        same = timesteps.shape == self._timesteps.shape and bool((timesteps == self._timesteps.to(timesteps)).all())
        if same:
            self._timesteps = timesteps
        return same

    def _same(self, stepped: bool) -> Event:
        assert self._last is not None
        # Second-order schedulers have consecutive equal timesteps, though never at the start.
        if self._last.place is None and self._repeats and self.done and (stepped or not self.was_stepped):
            return "next"
        if stepped and self._steps_once and self._last.is_rounded:
            return "next"  # consecutive timesteps that are equal in bfloat16, as at the start of Cosmos
        if stepped:
            raise UnsupportedModelError(
                f"The denoiser was called again for a timestep that {type(self._scheduler).__name__} has "
                f"already stepped over, so it is not known which step this call belongs to. {INSTEAD}"
            )
        return "again"

    def _timestep(self, timesteps: Any, arguments: Mapping[str, Any]) -> _Timestep:
        given = timestep_of(arguments)
        candidates = [given] if given is not None else pytree.tree_leaves(list(arguments.values()))
        for candidate in candidates:
            place = _place(candidate, timesteps)
            if place is not None:
                return _Timestep(place, None)
        if given is None:
            return _Timestep(None, None)
        # Usually there is one timestep for all rows; if rows or tokens have their own, the extremes identify them.
        values = torch.as_tensor(given).detach()
        least, most = torch.stack([values.min(), values.max()]).tolist() if values.numel() else (0.0, 0.0)
        is_rounded = values.is_floating_point() and torch.finfo(values.dtype).eps > torch.finfo(torch.float32).eps
        return _Timestep(None, (least, most), is_rounded)


def _place(timestep: Any, timesteps: Any) -> int | None:
    """Return the index of the element of `timesteps` that `timestep` is a view of; None if there is none."""
    if not (torch.is_tensor(timestep) and torch.is_tensor(timesteps)) or timesteps.ndim != 1 or not timesteps.numel():
        return None
    if any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)):
        return None  # several elements
    if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device or timestep.device.type == "meta":
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = int(timestep.storage_offset() - timesteps.storage_offset())
    place, rest = divmod(offset, timesteps.stride(0) or 1)
    return place if not rest and 0 <= place < len(timesteps) else None


#: Denoisers that convert a number to a tensor, as `with_tensor_timestep` does; others may use the number itself.
TAKE_NUMBERS = "diffusers.models.unets."


def dtype_of_number(timestep: object) -> torch.dtype | None:
    """Return the dtype that diffusers' UNets give a timestep that is a number; None if it is not a number."""
    if isinstance(timestep, float):
        return torch.float64
    return torch.int64 if isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool) else None


def with_tensor_timestep(
    denoiser: type, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call of a `denoiser` with its timestep as a tensor; a number would become a constant of the graph."""
    given = arguments.get("timestep")
    dtype = dtype_of_number(given)
    if dtype is None or not denoiser.__module__.startswith(TAKE_NUMBERS):
        return args, kwargs
    tensor = torch.tensor(given, dtype=dtype, device=latents_of(arguments).device)
    if "timestep" in kwargs:
        return args, {**kwargs, "timestep": tensor}
    place = list(arguments).index("timestep")
    return (*args[:place], tensor, *args[place + 1 :]), kwargs


MSG_GRADIENTS = (
    "{name!r} of the denoiser's call requires gradients (guidance by a loss, as in posterior sampling or CLIP "
    "guidance), which the optimized graphs do not compute. Detach it if no gradient is needed. " + INSTEAD
)


def check_gradients(arguments: Mapping[str, Any]) -> None:
    """Check that no input of a denoiser call requires gradients."""
    if torch.is_grad_enabled():
        for name, leaf in named_leaves(arguments):
            if torch.is_tensor(leaf) and leaf.requires_grad:
                raise UnsupportedModelError(MSG_GRADIENTS.format(name=name))


MSG_AUTOCAST = (
    "torch.autocast is on, and would change dtypes inside a graph that was captured for fixed ones. Switch it off, and "
    "convert the pipeline instead: pipe.to(torch.bfloat16), or from_pretrained(..., torch_dtype=torch.bfloat16)."
)


def check_autocast(latents: torch.Tensor) -> None:
    """Check that autocast is off on the device of `latents`."""
    if torch.is_autocast_enabled(latents.device.type):
        raise UnsupportedCallError(MSG_AUTOCAST)


@dataclass(frozen=True)
class Plan:
    """The plan of a generation, which has not run.

    Attributes:
        steps: each step with its phase.
        graphs: for each step the graphs that may serve it: the phase of each, and the denoiser call that it is captured
            for. There is one, or the head, the tail and the finish of a step that is decided while it runs.
        cache_bytes: the largest size in bytes of the caches kept between two timesteps.
    """

    steps: list[tuple[int, Phase]]
    graphs: list[list[tuple[Phase, Call]]]
    cache_bytes: int
