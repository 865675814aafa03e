"""What `optimize` leaves on a pipeline: a hook on each denoiser, and a call that is one generation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline

from tgate_compile._config import Config
from tgate_compile._errors import ConfigurationError
from tgate_compile._families import Family, family_of
from tgate_compile._generation import Generation, Plan, Previewed
from tgate_compile._hook import DenoiserHook
from tgate_compile._schedule import Schedule

_ATTRIBUTE = "_tgate_compile"

#: A gate step as users give it: for a pipeline with two denoisers it may be a pair, one for each.
GateStep = int | float | tuple[int | float, int | float]

MSG_NOT_OPTIMIZED = "This {pipeline} is not optimized. Call tgate_compile.optimize(pipe, gate_step=10) first."
MSG_BYPASSED = (
    "The {name} of this {pipeline} ran without tgate_compile: its hook has been taken off since the pipeline was "
    "optimized, as pipe.remove_all_hooks() and enable_model_cpu_offload() do. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)
MSG_NO_GATE = (
    "This call asks for gate_step={gate}, but the pipeline was optimized without a gate. "
    "Call restore(pipe), then optimize(pipe, gate_step=...)."
)
MSG_REPLACED = (
    "The {name} of this {pipeline} has been replaced since it was optimized. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)
MSG_PAIR = (
    "gate_step={given}: several gate steps are for a pipeline with as many denoisers, and this one has {names}. "
    "Give one number, or one for each."
)


class Optimized:
    """The hooks on a pipeline's denoisers, by the component's name."""

    def __init__(self, pipe: DiffusionPipeline, configs: Mapping[str, Config]) -> None:
        self.pipeline_class = type(pipe)
        self.family = family_of(self.pipeline_class)
        self.hooks = {name: DenoiserHook(getattr(pipe, name), config) for name, config in configs.items()}
        self.previewing = False

    @property
    def hook(self) -> DenoiserHook:
        """That of the first denoiser, which most pipelines have alone."""
        return next(iter(self.hooks.values()))

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Put the hooks on, and let `pipe`'s call be a generation."""
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
    """What `optimize` left on `pipe`; None if it is not optimized."""
    state = vars(pipe).get(_ATTRIBUTE) if hasattr(pipe, "__dict__") else None
    return state if isinstance(state, Optimized) else None


def required_state_of(pipe: object) -> Optimized:
    """What `optimize` left on `pipe`, which must be optimized."""
    state = state_of(pipe)
    if state is None:
        raise ConfigurationError(MSG_NOT_OPTIMIZED.format(pipeline=type(pipe).__name__))
    return state


@contextmanager
def generation(
    pipe: DiffusionPipeline,
    *,
    guidance: bool,
    gate_step: GateStep | None = None,
    num_timesteps: int | None = None,
) -> Iterator[None]:
    """Run one generation of your own denoising loop through the optimized denoiser.

    The pipeline's call does this itself. Set the scheduler's timesteps before the first denoiser call, and make the
    calls in the order of the timesteps, as the pipeline does: with the batch [uncond; cond] if guidance is on, or with
    a call for each half where the pipeline makes two.

    Args:
        pipe: an optimized pipeline; its scheduler is the loop's.
        guidance: whether the denoiser gets both halves.
        gate_step: instead of the one given to `optimize`.
        num_timesteps: how many of the scheduler's timesteps the loop visits, if not all.

    Raises:
        ConfigurationError: the pipeline is not optimized, or `gate_step` is wrong.
        ConcurrentGenerationError: another generation is running on this denoiser.
    """
    state = required_state_of(pipe)
    with _generation(state, pipe, gate_step, lambda: guidance, lambda: num_timesteps, watch=True):
        yield


def preview(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> dict[str, Plan]:
    """What `pipe(**call)` would run, by denoiser: its first denoiser call is the last thing that really happens.

    Prompts are encoded and latents made, graphs are captured and rewritten, but nothing is compiled or denoised.
    """
    state = required_state_of(pipe)
    state.previewing = True
    try:
        pipe(**call)
    except Previewed as first:
        args, kwargs = first.denoiser_args, first.denoiser_kwargs
        generations = {name: hook.last for name, hook in state.hooks.items()}
        plans = {name: g.plan(args, kwargs, first.guided) for name, g in generations.items() if g is not None}
        if isinstance(pipe, DiffusionPipeline):
            pipe.maybe_free_model_hooks()  # as the call itself would have done at its end
        return plans
    finally:
        state.previewing = False
    raise ConfigurationError(_bypassed(state))


def split_gate_step(gate_step: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The gate step of each denoiser.

    Raises:
        ConfigurationError: there are several, and not as many denoisers.
    """
    if not isinstance(gate_step, tuple):
        return dict.fromkeys(names, gate_step)
    if len(gate_step) != len(names) or len(names) == 1:
        raise ConfigurationError(MSG_PAIR.format(given=gate_step, names=", ".join(names)))
    return dict(zip(names, gate_step, strict=True))


@contextmanager
def _generation(
    state: Optimized,
    pipe: DiffusionPipeline,
    gate_step: GateStep | None,
    guided: Callable[[], bool],
    num_timesteps: Callable[[], int | None],
    *,
    watch: bool,
) -> Iterator[None]:
    gates = split_gate_step(gate_step, tuple(state.hooks))
    begun: Generation | None = None
    with ExitStack() as stack:
        for name, hook in state.hooks.items():
            if getattr(pipe, name) is not hook.denoiser:
                raise ConfigurationError(MSG_REPLACED.format(name=name, pipeline=state.pipeline_class.__name__))
            begun = Generation(
                hook.store,
                hook.own_forward,
                _schedule(hook.config.schedule, gates[name]),
                family=hook.config.family,
                guided=guided,
                scheduler=lambda: pipe.scheduler,
                num_calls=functools.partial(_num_calls, pipe, state.family, name, num_timesteps),
                watch=watch,
                preview=state.previewing,
                before=begun,
            )
            stack.enter_context(hook.generation(begun))
        yield


def _schedule(given: Schedule, gate_step: int | float | None) -> Schedule:
    """The schedule of one call, which may have a gate step of its own."""
    if gate_step is None:
        return given
    if given.gate_step is None:
        raise ConfigurationError(MSG_NO_GATE.format(gate=gate_step))
    return dataclasses.replace(given, gate_step=gate_step)


def _num_calls(
    pipe: DiffusionPipeline, family: Family, name: str, num_timesteps: Callable[[], int | None]
) -> int | None:
    """For how many timesteps the denoiser called `name` runs; None for all of the scheduler's."""
    boundary = boundary_of(pipe, family)
    if boundary is None:
        return num_timesteps()
    below = int((pipe.scheduler.timesteps < boundary).sum())
    return below if name == family.second else len(pipe.scheduler.timesteps) - below


def boundary_of(pipe: DiffusionPipeline, family: Family) -> float | None:
    """The timestep below which the second denoiser takes over; None if there is none."""
    ratio = pipe.config.get(family.boundary) if family.second is not None else None
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


@functools.cache
def _gated_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass with the same name, whose call is one generation. Only optimized objects get it."""
    original = pipeline_class.__call__
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    own = inspect.Parameter("gate_step", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="GateStep | None")
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))

    @functools.wraps(original)
    def call(self: DiffusionPipeline, *args: Any, gate_step: GateStep | None = None, **kwargs: Any) -> Any:
        state = required_state_of(self)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        watch = any(bound.arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))
        guided = guidance_of(self, bound.arguments)
        with _generation(state, self, gate_step, guided, lambda: getattr(self, "_num_timesteps", None), watch=watch):
            result = original(self, *args, **kwargs)
        ran = any(hook.last is not None and hook.last.steps for hook in state.hooks.values())
        if not ran and not getattr(self, "_interrupt", False):
            raise ConfigurationError(_bypassed(state))
        return result

    call.__signature__ = signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])  # type: ignore[attr-defined]
    namespace = {"__call__": call, "__module__": pipeline_class.__module__, "__doc__": pipeline_class.__doc__}
    gated = type(pipeline_class.__name__, (pipeline_class,), namespace)
    gated.__qualname__ = pipeline_class.__qualname__
    return gated


def _bypassed(state: Optimized) -> str:
    return MSG_BYPASSED.format(name=" and ".join(state.hooks), pipeline=state.pipeline_class.__name__)


def guidance_of(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Callable[[], bool]:
    """Whether guidance is on, now: the pipeline's own word if it has one, which a callback may change in mid-loop."""
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        return lambda: bool(pipe.do_classifier_free_guidance)
    further = arguments.get("kwargs")
    scale = {**(further if isinstance(further, dict) else {}), **arguments}.get("guidance_scale")
    return lambda: scale is not None and scale > 1.0
