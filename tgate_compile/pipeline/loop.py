"""The denoising loop: the state that denoisers share, pausing during callbacks, and starting over."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch.utils import _pytree as pytree

from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, EarlyValues
from tgate_compile.engine.purity import remember
from tgate_compile.passes.graphs import Emission
from tgate_compile.pipeline.progress import Progress

#: How to handle a pipeline or a call that cannot be gated.
OnUnsupported = Literal["error", "plain"]


#: The types of functions that can be wrapped without losing anything.
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


class Denoising(Protocol):
    """The part of a generation that its loop uses."""

    progress: Progress

    def check_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Check the first step of the scheduler after a call of this denoiser."""
        ...


class StartOver(BaseException):
    """Raised to leave a pipeline's call that cannot be gated although gated steps have run; it is repeated in full.

    It is not an error: it derives from BaseException so that no `except Exception` in a pipeline logs or stops it.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Previewed(BaseException):
    """Raised at the first denoiser call of a pipeline, to leave the pipeline's call with the denoiser's arguments.

    It is not an error: it derives from BaseException so that no `except Exception` in a pipeline logs or stops it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], guided: bool) -> None:
        super().__init__()
        self.denoiser_args = args
        self.denoiser_kwargs = kwargs
        self.guided = guided


class Loop:
    """One run of a pipeline's call, or of a custom denoising loop.

    Args:
        on_unsupported: how to handle a loop that cannot be gated.
        can_start_over: whether the whole call can be repeated.
        report: called with the reason when the rest of the loop runs without gating.
        is_pipeline: whether it is a pipeline's call, for which the user has not specified the guidance.
        reports_guidance: whether the pipeline or its arguments define if guidance is on.
        knows_order: whether it is known which half of a batch is the prompt's.
    """

    def __init__(
        self,
        *,
        on_unsupported: OnUnsupported = "error",
        can_start_over: bool = False,
        report: Callable[[Exception], None] = lambda cause: None,
        is_pipeline: bool = False,
        reports_guidance: bool = True,
        knows_order: bool = True,
    ) -> None:
        self.on_unsupported = on_unsupported
        self.can_start_over = can_start_over
        self.is_pipeline = is_pipeline
        self.reports_guidance = reports_guidance
        self.knows_order = knows_order
        self.observable = False  # whether the scheduler's calls are observed
        self.paused = 0  # the number of nested callbacks
        self.plain = False  # whether the rest of the loop runs without gating
        self.gated = False  # whether a step has differed from the plain pipeline's
        self.timesteps_set = False  # whether the scheduler's timesteps have been set in this loop
        self.stepped = 0  # the number of calls of the scheduler's step
        self.generations: list[Denoising] = []
        self.current: Denoising | None = None  # the generation that made the last denoiser call
        self.cause: Exception | None = None  # the reason why the loop runs without gating
        self.note_uncaptured: Callable[[Exception], None] = lambda cause: None
        self._report = report
        self.on_new_timesteps: Callable[[], None] = lambda: None

    @property
    def knows_guidance(self) -> bool:
        """Whether the reported guidance is reliable; user code may use `guidance_scale` for something else."""
        return self.reports_guidance and self.knows_order

    def run_plain(self, cause: Exception) -> None:
        """Run the rest of the loop in full, since it cannot be gated, or raise `cause`.

        Raises:
            StartOver: steps have already been gated, so the call must be repeated.
        """
        if self.on_unsupported == "error" or (self.gated and not self.can_start_over):
            raise cause
        self.cause = cause
        self._report(cause)
        if self.gated:
            raise StartOver(cause) from cause
        self.plain = True

    def on_set_timesteps(self) -> None:
        """Note that the scheduler's timesteps are set again."""
        if self.paused:
            return  # the loop keeps its present timesteps
        self.timesteps_set = True
        self.on_new_timesteps()
        for generation in self.generations:
            generation.progress.on_set_timesteps()

    def on_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Note that the scheduler steps the latents `sample` with `prediction`."""
        self.stepped += 1
        if self.paused or self.plain:
            return
        first_since_call = self.current is not None and not self.current.progress.stepped
        for generation in self.generations:
            generation.progress.on_step()
        if first_since_call and self.current is not None:
            self.current.check_step(prediction, sample)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude denoiser calls inside the context from the loop."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def outside(self, name: str, value: Any) -> Any:
        """Return the argument `name` of the pipeline's call; a callback is wrapped so that it pauses the loop."""
        if isinstance(value, (PipelineCallback, MultiPipelineCallbacks)):
            return _PausingCallbacks(self, value)
        if not is_callback(name, value):
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self.outside(name, item) for item in value)

        @functools.wraps(value)
        def paused(*args: Any, **kwargs: Any) -> Any:
            with self.pause():
                return value(*args, **kwargs)

        return paused


def is_callback(name: str, value: Any) -> bool:
    """Return whether the argument `name` of a pipeline's call is a function that the pipeline will call.

    Other callable objects (tokenizers, modules) are not wrapped, since the pipeline may need their attributes.
    """
    if isinstance(value, (list, tuple)):
        return "callback" in name and any(callable(item) for item in value)
    return isinstance(value, FUNCTIONS) or (callable(value) and "callback" in name)


#: torch.export's words for a result that is not made of tensors, such as a cache of the model's own.
RETURNS_OTHERS = "in output, which is not a known type"

MSG_FILLS_CACHE = (
    "{model} fills a cache of keys and values in this step, which no graph can do, so that the step cannot compute "
    "cached values of tgate_compile as well. Compute them in a later step (gate_step=2 or later; warm_up=2 for methods "
    "that skip blocks or attentions; methods that decide at run time cannot wait), or switch the pipeline's own cache "
    "off, as with use_kv_cache=False in Qwen-Image 2.1."
)


class Uncaptured:
    """The denoiser itself, for a phase that needs no graph since it caches nothing.

    It takes the place of a graph if the denoiser cannot be captured: guidance can still be dropped.
    """

    emitted: tuple[Emission, ...] = ()

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._spec: pytree.TreeSpec | None = None

    def run(
        self, call: Call, caches: CachedValues, early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        args, kwargs = call.arguments
        outputs, self._spec = pytree.tree_flatten(self._forward(*args, **kwargs))
        return outputs, []

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        assert self._spec is not None
        return pytree.tree_unflatten(outputs, self._spec)


class _PausingCallbacks(MultiPipelineCallbacks):  # type: ignore[misc]
    """A wrapper of diffusers' callback objects, which a pipeline recognizes by class."""

    def __init__(self, loop: Loop, callback: Any) -> None:
        super().__init__([callback])
        self._loop = loop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._loop.pause():
            return super().__call__(*args, **kwargs)


@contextmanager
def rewindable(
    arguments: Mapping[str, Any], denoisers: Sequence[torch.nn.Module], scheduler: Any = None, *, keep: bool
) -> Iterator[Callable[[], bool]]:
    """Yield a function that restores the present state before a call is repeated; it does nothing unless `keep`.

    The state consists of torch's random number generators, the generators among the call's `arguments`, and the
    scheduler. If there are callbacks among the arguments, it includes the Python state of the `denoisers`, which they
    may put hooks on. The function returns whether the call can be repeated, which it cannot be if tensors among the
    arguments have been changed.
    """
    if not keep:
        yield lambda: False
        return
    leaves = pytree.tree_leaves(list(arguments.values()))
    tensors = [leaf for leaf in leaves if torch.is_tensor(leaf) and not leaf.is_inference()]
    versions = [tensor._version for tensor in tensors]
    attributes = {name: copy.copy(value) for name, value in getattr(scheduler, "__dict__", {}).items()}
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    own = [(generator, generator.get_state()) for generator in generators]
    calls_back = any(is_callback(name, value) for name, value in arguments.items())
    restores = [remember(denoiser) for denoiser in denoisers] if calls_back else []
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def rewind() -> bool:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)
        for restore in restores:
            restore()
        if attributes:
            vars(scheduler).clear()
            vars(scheduler).update({name: copy.copy(value) for name, value in attributes.items()})
        return [tensor._version for tensor in tensors] == versions

    yield rewind
