"""The loop that calls the denoisers: shared by all of one call, paused, and started over."""

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

from tgate_compile.engine.purity import remember
from tgate_compile.pipeline.progress import Progress

#: What becomes of a pipeline or a call that cannot be gated.
OnUnsupported = Literal["error", "plain"]


#: The types of functions that can be wrapped without losing anything.
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


class Denoising(Protocol):
    """What a loop knows of each of its denoisers: a generation."""

    progress: Progress

    def check_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Hear of the first step of the scheduler after a call of this denoiser."""
        ...


class StartOver(BaseException):
    """Leaves a pipeline call that turned out not to be gateable after gated steps had run; it is run again, in full.

    It is not an error, and no `except Exception` in a pipeline or its blocks may log or stop it.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Loop:
    """One run of a pipeline's call, or of a denoising loop of one's own.

    Args:
        on_unsupported: what to do if it cannot be gated.
        can_start_over: whether the whole call can be repeated.
        report: told the reason when the rest of the loop runs plain.
        is_pipeline: whether it is a pipeline's own call, of which no one has said what its batches are.
        says_guidance: whether the pipeline says by itself if guidance is on.
        knows_order: whether it is known which half of a batch is the prompt's.
    """

    def __init__(
        self,
        *,
        on_unsupported: OnUnsupported = "error",
        can_start_over: bool = False,
        report: Callable[[Exception], None] = lambda cause: None,
        is_pipeline: bool = False,
        says_guidance: bool = True,
        knows_order: bool = True,
    ) -> None:
        self.on_unsupported = on_unsupported
        self.can_start_over = can_start_over
        self.is_pipeline = is_pipeline
        self.says_guidance = says_guidance
        self.knows_order = knows_order
        self.observable = False  # whether the scheduler's calls are seen
        self.paused = 0  # inside this many callbacks
        self.plain = False
        self.gated = False  # whether a step has been different from the plain pipeline's
        self.stepped = 0  # calls of the scheduler's step
        self.generations: list[Denoising] = []
        self.current: Denoising | None = None  # that made the last denoiser call
        self.cause: Exception | None = None  # why it runs plain
        self._report = report
        self.on_new_timesteps: Callable[[], None] = lambda: None

    @property
    def knows_guidance(self) -> bool:
        """Whether the pipeline's word on guidance is final: user code may call something else `guidance_scale`."""
        return self.says_guidance and self.knows_order

    def run_plain(self, cause: Exception) -> None:
        """Run the rest of the loop in full, since it cannot be gated; or raise `cause`.

        Raises:
            StartOver: steps have been gated already, so that the call must be repeated.
        """
        if self.on_unsupported == "error" or (self.gated and not self.can_start_over):
            raise cause
        self.cause = cause
        self._report(cause)
        if self.gated:
            raise StartOver(cause) from cause
        self.plain = True

    def on_set_timesteps(self) -> None:
        """The scheduler's timesteps are set anew."""
        if self.paused:
            return  # the loop goes on over those that it has
        self.on_new_timesteps()
        for generation in self.generations:
            generation.progress.on_set_timesteps()

    def on_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """The scheduler steps from the latents `sample`, by `prediction`."""
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
        """Denoiser calls inside the context are not part of the loop."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def outside(self, name: str, value: Any) -> Any:
        """The argument `name` of the pipeline's call; if it is a callback, its denoiser calls are not the loop's."""
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
    """Whether the argument `name` of a pipeline's call is something that it will call.

    Other callable objects (tokenizers, modules) have attributes that the pipeline may need.
    """
    if isinstance(value, (list, tuple)):
        return "callback" in name and any(callable(item) for item in value)
    return isinstance(value, FUNCTIONS) or (callable(value) and "callback" in name)


class _PausingCallbacks(MultiPipelineCallbacks):  # type: ignore[misc]
    """diffusers' own callbacks, which a pipeline recognizes by their class."""

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
    """Give a function that puts things back to what they are now; it does nothing unless `keep`.

    These are torch's random number generators and those among a call's `arguments`, and the scheduler; and, if there
    are callbacks among the arguments, the Python state of the `denoisers`, on which they may put hooks. It returns
    whether the call can be repeated: not if tensors among the arguments have been changed meanwhile.
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
