"""The state of an optimized pipeline: a hook on each denoiser, and a call that runs as one generation."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

from diffusers import DiffusionPipeline

from tgate_compile._errors import CaptureError, ConfigurationError, UnsupportedModelError
from tgate_compile.engine.compiled import Parking
from tgate_compile.engine.config import AnyPipeline, Config
from tgate_compile.engine.families import Family
from tgate_compile.engine.traffic import exclusive, running
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.facts import (
    NO_FACTS,
    CallFacts,
    facts_of_call,
    knows_order,
    note_new_loop,
    num_calls_of,
    reports_guidance,
)
from tgate_compile.pipeline.generation import Generation
from tgate_compile.pipeline.hook import MSG_NO_COPY, GatedDenoiser, Service, hook_of
from tgate_compile.pipeline.loop import Loop, OnUnsupported, Previewed, StartOver, rewindable
from tgate_compile.pipeline.modular import copied_guiders, family_of_pipeline
from tgate_compile.pipeline.progress import Plan
from tgate_compile.pipeline.two_halves import observed

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_tgate_compile"

#: A gate step as passed by the user: for a pipeline with two denoisers it may be a pair, one for each.
GateStep = int | float | tuple[int | float, int | float]

MSG_NOT_OPTIMIZED = "This {pipeline} is not optimized. Call tgate_compile.optimize(pipe, gate_step=10) first."
MSG_BYPASSED = (
    "The {name} of this {pipeline} ran without tgate_compile: its hook has been removed since the pipeline was "
    "optimized, as pipe.remove_all_hooks() and enable_model_cpu_offload() do. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)
MSG_OTHER_FORWARD = (
    "The {name} of this {pipeline} ran without tgate_compile: its forward has been replaced since the pipeline was "
    "optimized, and does not call the previous one. Undo that, or call tgate_compile.restore(pipe) before it."
)
MSG_NOT_CALLED = (
    "The {name} of this {pipeline} was not called, so there is nothing to gate: the pipeline runs parts of it, or "
    "another model. Call tgate_compile.restore(pipe) to run it without gating, or select another denoiser: "
    'optimize(pipe, denoiser="...").'
)
MSG_CALLED_APART = (
    "Nothing was gated in this call of {pipeline}: its denoiser was called only from a function among the call's "
    "arguments, which is assumed to be a callback. If that function is the denoising loop, run it in "
    "tgate_compile.generation(pipe, guidance=...)."
)
MSG_NO_GATE = (
    "This call has gate_step={gate}, but the pipeline was optimized without a gate. "
    "Call restore(pipe), then optimize(pipe, gate_step=...)."
)
MSG_REPLACED = (
    "The {name} of this {pipeline} has been replaced since it was optimized. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)
MSG_COMPILED_SINCE = (
    "The {name} of this {pipeline} has been compiled with torch.compile since it was optimized, which would compile "
    "tgate_compile's hook instead of its graphs. Undo that (pipe.{name}._compiled_call_impl = None): the graphs of the "
    "optimized denoiser are already compiled."
)
MSG_PAIR = (
    "gate_step={given}: a pipeline takes several gate steps only if it has as many denoisers, but this one has "
    "{names}. Pass one number, or one for each denoiser."
)


class Optimized:
    """The state of an optimized pipeline: its gated denoisers, by the component's name.

    Args:
        pipe: the pipeline.
        configs: the configuration of each denoiser.
        on_unsupported: how to handle calls that cannot be gated.
        plain_because: the reason why no call can be gated; None if calls can be gated.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        configs: Mapping[str, Config],
        *,
        on_unsupported: OnUnsupported = "error",
        plain_because: Exception | None = None,
    ) -> None:
        self.pipeline_class = type(pipe)
        self.family = family_of_pipeline(pipe)
        self.hooks = {name: GatedDenoiser(getattr(pipe, name), config) for name, config in configs.items()}
        self.on_unsupported = on_unsupported
        self.plain_because = plain_because
        self.previewing = False
        self.last_plain: Exception | None = plain_because  # the reason why the last call could not be gated, if any
        self._warned: set[str] = set()

    def warn_once(self, message: str, *, about: str) -> None:
        """Log a warning, unless there has already been one with the same `about`."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", message)

    def note_uncaptured(self, cause: Exception) -> None:
        """Log, once per cause, that the denoiser runs without being captured, which drops guidance all the same."""
        self.warn_once(
            f"The denoiser of {self.pipeline_class.__name__} runs uncompiled; guidance is dropped as requested. "
            + str(cause).partition("\n")[0],
            about="uncaptured",
        )

    def report_plain(self, cause: Exception) -> None:
        """Log, once per cause, that a call runs without tgate_compile."""
        self.last_plain = cause
        name = self.pipeline_class.__name__
        self.warn_once(
            f"This call of {name} runs in full, since it cannot be gated. {cause}",
            about=type(cause).__name__ + str(cause),
        )

    @property
    def hook(self) -> GatedDenoiser:
        """The gated denoiser, or the first of two."""
        return next(iter(self.hooks.values()))

    def view(self, pipe: DiffusionPipeline, services: Mapping[str, Service]) -> DiffusionPipeline:
        """Return a pipeline with the components of the optimized `pipe` for one request among many.

        It has its own scheduler, guiders and state; its denoisers are served by `services`, by name.
        """
        own = copy.copy(self)
        own.hooks = {name: hook.served_by(services[name]) for name, hook in self.hooks.items()}
        view: DiffusionPipeline = object.__new__(type(pipe))
        # Not by setattr, which diffusers overrides to change the configuration as well.
        changing = {"scheduler": copy.deepcopy(pipe.scheduler), **copied_guiders(pipe)}
        vars(view).update({**vars(pipe), _ATTRIBUTE: own, **changing})
        return view

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Register the hooks, and make the call of `pipe` run as a generation."""
        for hook in self.hooks.values():
            hook.attach()
        setattr(pipe, _ATTRIBUTE, self)
        pipe.__class__ = _gated_class(self.pipeline_class)  # type: ignore[arg-type]

    def detach(self, pipe: DiffusionPipeline) -> None:
        """Undo `attach`."""
        pipe.__class__ = self.pipeline_class
        delattr(pipe, _ATTRIBUTE)
        for hook in self.hooks.values():
            hook.detach()


def state_of(pipe: object) -> Optimized | None:
    """Return the state that `optimize` stored on `pipe`; None if the pipeline is not optimized."""
    state = vars(pipe).get(_ATTRIBUTE) if hasattr(pipe, "__dict__") else None
    return state if isinstance(state, Optimized) else None


def required_state_of(pipe: object) -> Optimized:
    """Return the state that `optimize` stored on `pipe`.

    Raises:
        ConfigurationError: the pipeline is not optimized.
    """
    state = state_of(pipe)
    if state is None:
        raise ConfigurationError(MSG_NOT_OPTIMIZED.format(pipeline=type(pipe).__name__))
    return state


class OwnLoop:
    """A denoising loop of your own, as `generation` yields it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which the denoiser runs as if it were not optimized, and its calls are not counted."""
        return self._loop.pause()


@contextmanager
def generation(
    pipe: AnyPipeline,
    *,
    guidance: bool,
    gate_step: GateStep | None = None,
    num_timesteps: int | None = None,
) -> Iterator[OwnLoop]:
    """Run one generation of your own denoising loop with the optimized denoiser.

    The pipeline's call does this automatically. Set the scheduler's timesteps before the first denoiser call, and make
    the calls in the order of the timesteps, as the pipeline does: with the batch [uncond; cond] if guidance is on, or
    with a call for each half if the pipeline makes two. Put calls that are not part of the loop, such as those for a
    preview, inside `paused()` of the yielded object:

        with tgate_compile.generation(pipe, guidance=True) as loop:
            for timestep in pipe.scheduler.timesteps:
                ...
                with loop.paused():
                    preview = pipe.unet(latents, timestep, encoder_hidden_states=text).sample

    Args:
        pipe: an optimized pipeline, whose scheduler the loop uses.
        guidance: whether the denoiser gets both halves.
        gate_step: a gate step that replaces the one passed to `optimize`.
        num_timesteps: the number of the scheduler's timesteps that the loop visits, if not all.

    Raises:
        ConfigurationError: the pipeline is not optimized, or `gate_step` is wrong.
        ConcurrentGenerationError: another generation is running on this denoiser.
    """
    state = required_state_of(pipe)
    state.last_plain = None
    loop = Loop(on_unsupported=state.on_unsupported, report=state.report_plain)
    loop.note_uncaptured = state.note_uncaptured
    facts = CallFacts(lambda name: guidance, lambda: num_timesteps, watch=True)
    with _generations_of_call(state, pipe, gate_step, lambda: facts, loop):
        yield OwnLoop(loop)


@exclusive()  # another thread's call may use the same graphs
def preview(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the plan of `pipe(**call)` for each denoiser, by running the call up to its first denoiser call.

    Prompts are encoded, latents prepared, and graphs captured and rewritten, but nothing is compiled or denoised. The
    result is empty for a call that cannot be gated and runs in full (`state.last_plain` holds the reason).
    """
    state = required_state_of(pipe)
    state.previewing = True
    try:
        pipe(**call)
    except Previewed as first:
        args, kwargs = first.denoiser_args, first.denoiser_kwargs
        generations = {name: hook.last for name, hook in state.hooks.items()}
        plans: dict[str, Plan] = {}
        try:
            if state.last_plain is None:
                plans = {name: g.plan(args, kwargs, first.guided) for name, g in generations.items() if g is not None}
        except (UnsupportedModelError, CaptureError) as cause:
            if state.on_unsupported == "error":
                raise
            state.report_plain(cause)
        if isinstance(pipe, DiffusionPipeline):
            pipe.maybe_free_model_hooks()  # as the call itself would have done at its end
        return plans
    finally:
        state.previewing = False
    raise ConfigurationError(_bypassed(state))


def split_gate_step(gate_step: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the gate step of each of the denoisers `names`.

    Raises:
        ConfigurationError: there are several gate steps, and their number differs from that of the denoisers.
    """
    if not isinstance(gate_step, tuple):
        return dict.fromkeys(names, gate_step)
    if len(gate_step) != len(names) or len(names) == 1:
        raise ConfigurationError(MSG_PAIR.format(given=gate_step, names=", ".join(names)))
    return dict(zip(names, gate_step, strict=True))


@contextmanager
def _generations_of_call(
    state: Optimized, pipe: DiffusionPipeline, gate_step: GateStep | None, facts: Callable[[], CallFacts], loop: Loop
) -> Iterator[None]:
    """Activate a generation for each denoiser of `pipe`, and observe its scheduler, inside the context."""
    gates = split_gate_step(gate_step, tuple(state.hooks))
    schedules = {name: _schedule(hook.config.schedule, gates[name]) for name, hook in state.hooks.items()}
    pipeline = state.pipeline_class.__name__
    begun: Generation | None = None
    with ExitStack() as stack:
        for name, hook in state.hooks.items():
            if getattr(pipe, name) is not hook.denoiser:
                raise ConfigurationError(MSG_REPLACED.format(name=name, pipeline=pipeline))
            if hook.denoiser._compiled_call_impl is not None:
                raise ConfigurationError(MSG_COMPILED_SINCE.format(name=name, pipeline=pipeline))
        known = NO_FACTS
        try:
            if state.plain_because is not None:
                raise state.plain_because
            if not loop.plain:
                known = facts()
        except UnsupportedModelError as cause:
            loop.run_plain(cause)
        for name, hook in state.hooks.items():
            begun = Generation(
                hook.store,
                hook.own_forward,
                schedules[name],
                family=hook.config.family,
                guided=functools.partial(known.guided, name),
                scheduler=lambda: pipe.scheduler,
                num_calls=functools.partial(num_calls_of, pipe, state.family, name, known.num_timesteps),
                watch=known.watch,
                loop=loop,
                preview=state.previewing,
                guided_at=None if known.guided_at is None else functools.partial(known.guided_at, name),
                before=begun,
                parking=Parking() if hook.config.offload_prelude else None,
                admit=hook.admit,
            )
            loop.generations.append(begun)
            stack.enter_context(hook.activated(begun))
        loop.observable = stack.enter_context(observed(getattr(pipe, "scheduler", None), loop))
        yield


def _schedule(given: Schedule, gate_step: int | float | None) -> Schedule:
    """Return the schedule of one call, which may override the gate step."""
    if gate_step is None:
        return given
    if given.gate_step is None:
        raise ConfigurationError(MSG_NO_GATE.format(gate=gate_step))
    return dataclasses.replace(given, gate_step=gate_step)


@functools.cache
def _gated_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Return a subclass with the same name whose call runs as one generation. Only optimized objects get it."""
    original = pipeline_class.__call__
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    own = inspect.Parameter("gate_step", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="GateStep | None")
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))

    @functools.wraps(original)
    def call(self: DiffusionPipeline, *args: Any, gate_step: GateStep | None = None, **kwargs: Any) -> Any:
        state = required_state_of(self)
        bound = signature.bind(self, *args, **kwargs)
        given = {**bound.arguments, **kwargs}  # with the entries of **kwargs under their own names
        bound.apply_defaults()
        arguments = {**bound.arguments, **kwargs}
        denoisers = [hook.denoiser for hook in state.hooks.values()]
        scheduler = getattr(self, "scheduler", None)
        with rewindable(given, denoisers, scheduler, keep=state.on_unsupported == "plain") as rewind:
            try:
                return _run(state, self, gate_step, arguments, original, args, kwargs)
            except StartOver as found:
                cause = found.cause
                if not rewind():
                    raise cause from None
        return _run(state, self, gate_step, arguments, original, args, kwargs, plain_because=cause)

    def refuse_copies(self: DiffusionPipeline, protocol: Any) -> Any:
        raise ConfigurationError(MSG_NO_COPY)

    call.__signature__ = signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])  # type: ignore[attr-defined]
    namespace = {
        "__call__": call,
        "__reduce_ex__": refuse_copies,
        "__module__": pipeline_class.__module__,
        "__doc__": pipeline_class.__doc__,
    }
    gated = type(pipeline_class.__name__, (pipeline_class,), namespace)
    gated.__qualname__ = pipeline_class.__qualname__
    return gated


def _run(
    state: Optimized,
    pipe: DiffusionPipeline,
    gate_step: GateStep | None,
    arguments: Mapping[str, Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain_because: Exception | None = None,
) -> Any:
    """Run the pipeline's original `call` as one generation; `arguments` holds all of its arguments by name."""
    state.last_plain = None
    loop = Loop(
        on_unsupported=state.on_unsupported,
        can_start_over=True,
        report=state.report_plain,
        is_pipeline=True,
        reports_guidance=reports_guidance(pipe, arguments),
        knows_order=knows_order(state.pipeline_class),
    )
    if plain_because is not None:
        loop.run_plain(plain_because)
    loop.note_uncaptured = state.note_uncaptured
    loop.on_new_timesteps = functools.partial(note_new_loop, pipe)
    note_new_loop(pipe)
    names = [*inspect.signature(call).parameters][1:]
    with running(), _generations_of_call(state, pipe, gate_step, lambda: facts_of_call(state, pipe, arguments), loop):
        in_order = [loop.outside(name, value) for name, value in zip_longest(names[: len(args)], args, fillvalue="")]
        by_name = {name: loop.outside(name, value) for name, value in kwargs.items()}
        result = call(pipe, *in_order, **by_name)
    _check_what_ran(state, pipe, loop)
    return result


def _check_what_ran(state: Optimized, pipe: DiffusionPipeline, loop: Loop) -> None:
    """Check after a call that the denoiser ran through our hook, and warn if the gate did not act."""
    ran = [hook.last for hook in state.hooks.values() if hook.last is not None and hook.last.steps]
    if loop.plain or loop.gated:
        return
    ends = any(g.schedule.guidance_step is not None or g.schedule.guidance_similarity is not None for g in ran)
    if ends and not any(phase.guided for g in ran for _, phase in g.steps):
        state.warn_once(
            f"This call of {state.pipeline_class.__name__} had no guidance to drop: {_why_unguided(state.family)}, so "
            "that the denoiser made one prediction in each step. The result is the plain pipeline's.",
            about="no guidance",
        )
    if not ran:
        # Without a step of the scheduler there was nothing to do, as in an image-to-image call of no steps.
        if any(hook.last is not None and hook.last.calls_apart for hook in state.hooks.values()):
            state.warn_once(MSG_CALLED_APART.format(pipeline=state.pipeline_class.__name__), about="apart")
            return
        if (loop.stepped or not loop.observable) and not getattr(pipe, "_interrupt", False):
            raise ConfigurationError(_bypassed(state))
        return
    gates = [g.schedule.gate_step for g in ran if g.schedule.gate_step is not None]
    steps = max(generation.num_steps for generation in ran)
    if gates and not getattr(pipe, "_interrupt", False):
        advice = (
            f"Use a gate_step of at most {steps - 1}, or a fraction such as gate_step=0.4, which adapts to the number "
            "of steps."
        )
        state.warn_once(
            f"The gate had no effect in this call of {state.pipeline_class.__name__}: it ran {steps} steps, and "
            f"gate_step is {max(gates)}. {advice if steps > 1 else 'With a single step, there is nothing to gate.'}",
            about="gate",
        )


def _why_unguided(family: Family) -> str:
    if family.unguided:
        return "its denoiser takes the guidance scale as an input, or has been distilled to need no guidance"
    if family.negative:
        return f"guidance is off without a negative prompt and {family.scale} above 1"
    return "guidance was off"


def _bypassed(state: Optimized) -> str:
    """Return the message for a call whose denoiser did not run through our hook."""
    if all(hook.is_attached for hook in state.hooks.values()):
        message = MSG_NOT_CALLED
    else:
        hooked = all(hook_of(hook.denoiser) is not None for hook in state.hooks.values())
        message = MSG_OTHER_FORWARD if hooked else MSG_BYPASSED
    return message.format(name=" and ".join(state.hooks), pipeline=state.pipeline_class.__name__)
