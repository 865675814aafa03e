"""Read from a pipeline's call whether guidance is on, and how many timesteps it visits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from tgate_compile.engine.families import Family, family_of, is_listed
from tgate_compile.engine.read_code import TRUSTED
from tgate_compile.pipeline.loop import FUNCTIONS, is_callback
from tgate_compile.pipeline.modular import Guidance, check_guider, has_own_blocks, is_modular

if TYPE_CHECKING:
    from tgate_compile.pipeline.optimized import Optimized


@dataclass(frozen=True)
class CallFacts:
    """Facts about a generation, from a pipeline's call or, for a custom loop, from the user.

    Attributes:
        guided: returns whether guidance is on for the denoiser with a given name, at the present call.
        num_timesteps: returns the number of the scheduler's timesteps that the loop visits; None for all.
        watch: whether to check the denoiser for changes at every call.
        guided_at: returns whether guidance will be on for a denoiser at a timestep; None if guidance does not change.
    """

    guided: Callable[[str], bool]
    num_timesteps: Callable[[], int | None]
    watch: bool
    guided_at: Callable[[str, int], bool] | None = None


NO_FACTS = CallFacts(lambda name: False, lambda: None, watch=False)


def num_calls_of(
    pipe: DiffusionPipeline, family: Family, name: str, num_timesteps: Callable[[], int | None]
) -> int | None:
    """Return the number of timesteps that the denoiser called `name` runs for; None for all of the scheduler's."""
    boundary = boundary_of(pipe, family)
    if boundary is None:
        return num_timesteps()
    below = int((pipe.scheduler.timesteps < boundary).sum())
    return below if name == family.second else len(pipe.scheduler.timesteps) - below


def boundary_of(pipe: DiffusionPipeline, family: Family) -> float | None:
    """Return the timestep below which the second denoiser takes over; None if there is only one denoiser."""
    ratio = pipe.config.get(family.boundary) if family.second is not None else None
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


def facts_of_call(state: Optimized, pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> CallFacts:
    """Return the facts about the generation of a pipeline's call with these arguments."""
    if is_modular(pipe):
        guidance = Guidance(pipe, tuple(state.hooks))
        return CallFacts(guidance, guidance.num_timesteps, has_own_blocks(pipe), guidance.at)
    guided = guidance_of(pipe, arguments)
    until = arguments.get(state.family.until) if state.family.until else None

    def guided_at(name: str, timestep: int) -> bool:
        return guided() and (until is None or (timestep + 1) / len(pipe.scheduler.timesteps) <= until)

    return CallFacts(
        lambda name: (
            guided_at(name, getattr(pipe.scheduler, "step_index", None) or 0) if until is not None else guided()
        ),
        lambda: _num_timesteps(pipe),
        _may_change(state, pipe, arguments),
        None if until is None else guided_at,
    )


def _may_change(state: Optimized, pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> bool:
    """Return whether code outside of diffusers runs during the loop, which may change the denoiser.

    Examples are callbacks, hooks on the denoiser, and custom pipelines or schedulers. Other calls do not need the
    check of the denoiser at every step, which takes milliseconds.
    """
    scheduler = getattr(pipe, "scheduler", None)
    classes = (*state.pipeline_class.__mro__, *type(scheduler).__mro__)
    hooks = [(*hook.denoiser._forward_hooks, *hook.denoiser._forward_pre_hooks) for hook in state.hooks.values()]
    replaced = [value for owner in (pipe, scheduler) for value in getattr(owner, "__dict__", {}).values()]
    return (
        any(hooks)
        or any(is_callback(name, value) or (callable(value) and value is not pipe) for name, value in arguments.items())
        or any(isinstance(value, FUNCTIONS) and not _is_ours(value) for value in replaced)
        or any(
            kind.__module__.partition(".")[0] not in TRUSTED and kind.__module__ not in _OF_BASES for kind in classes
        )
    )


def _is_ours(function: object) -> bool:
    """Return whether `function` is this library's own, such as a timer, and wraps nothing but a method of its class."""
    # Not by `__module__`, which `functools.wraps` copies.
    home = str(getattr(function, "__globals__", {}).get("__name__"))
    wrapped = getattr(function, "__wrapped__", None)
    owner = type(getattr(wrapped, "__self__", None))
    of_class = getattr(owner, getattr(wrapped, "__name__", ""), None) is getattr(wrapped, "__func__", wrapped)
    return home.startswith("tgate_compile.") and of_class


#: Modules that define base classes of diffusers' pipelines and schedulers.
_OF_BASES = ("builtins", "huggingface_hub.hub_mixin", "enum", "abc", "collections", "typing")


class _Earlier(int):
    """A number of timesteps that a pipeline has set for an earlier loop."""


def _num_timesteps(pipe: DiffusionPipeline) -> int | None:
    """Return the number of timesteps that the pipeline has set for its present loop; None if it has not."""
    given = getattr(pipe, "_num_timesteps", None)
    return None if isinstance(given, _Earlier) else given


def note_new_loop(pipe: DiffusionPipeline) -> None:
    """Mark the pipeline's number of timesteps as belonging to an earlier loop."""
    given = vars(pipe).get("_num_timesteps") if hasattr(pipe, "__dict__") else None
    if type(given) is int:
        vars(pipe)["_num_timesteps"] = _Earlier(given)


def guidance_of(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Callable[[], bool]:
    """Return a function that reports whether guidance is on, which a callback may change during the loop.

    It reads the pipeline's `do_classifier_free_guidance` if there is one, else the argument that scales guidance.

    Raises:
        UnsupportedModelError: guidance is up to a guider that cannot be gated.
    """
    family = family_of(type(pipe))
    if family.unguided:
        return lambda: False
    if family.guiders:
        return _guidance_of_guiders(pipe, family.guiders)
    scale = arguments.get(family.scale)
    needs_negative = bool(family.negative)
    has_negative = arguments.get("negative_prompt") is not None or all(
        arguments.get(name) is not None for name in family.negative
    )

    def by_scale() -> bool:
        return scale is not None and scale > 1.0 and (has_negative or not needs_negative)

    def by_property() -> bool:
        try:
            return bool(pipe.do_classifier_free_guidance)
        except AttributeError:  # a subclass has its own loop, which does not set what the property reads
            return by_scale()

    return by_property if hasattr(type(pipe), "do_classifier_free_guidance") and not needs_negative else by_scale


def _guidance_of_guiders(pipe: DiffusionPipeline, names: Sequence[str]) -> Callable[[], bool]:
    """Return a function that reports whether the guider of the present timestep makes two predictions."""
    guiders = [guider for name in names if (guider := getattr(pipe, name, None)) is not None]
    for guider in guiders:
        check_guider(guider, type(pipe).__name__)

    def guided() -> bool:
        timestep = getattr(pipe, "_current_timestep", None)
        return any(guider._timestep is timestep and guider.num_conditions > 1 for guider in guiders)

    return guided


def reports_guidance(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> bool:
    """Return whether the pipeline or its arguments define if guidance is on, as `guidance_of` reads it."""
    family = family_of(type(pipe))
    return (
        family.unguided
        or bool(family.guiders)
        or hasattr(type(pipe), "do_classifier_free_guidance")
        or arguments.get(family.scale) is not None
    )


def knows_order(pipeline_class: type) -> bool:
    """Return whether the pipeline's call is diffusers' code, with the order of the halves that its row has."""
    author = next((base for base in pipeline_class.__mro__ if "__call__" in vars(base)), pipeline_class)
    return author.__module__.partition(".")[0] == "diffusers" and is_listed(pipeline_class)
