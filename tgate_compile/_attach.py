"""Put schedules on a pipeline, and take them off: everything is checked before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from tgate_compile._backends import check_backend
from tgate_compile._capture import MSG_NO_SITES, check_patterns, denies_cross_attention
from tgate_compile._config import Config
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile._families import DENOISER_NAMES, JOINT_ATTENTION, family_of, refusal
from tgate_compile._generation import MSG_CONCURRENT
from tgate_compile._live_tensors import check_quantization
from tgate_compile._offload import HOOK_NAME, check_weights_stay
from tgate_compile._optimized import Optimized, boundary_of, required_state_of, state_of
from tgate_compile._schedule import Schedule

MSG_NO_PIPELINE = (
    "optimize() needs a loaded diffusers pipeline, but got {given}. "
    "For example: optimize(StableDiffusionPipeline.from_pretrained(...), gate_step=10)."
)
MSG_NO_DENOISER = "{pipeline} has no denoiser: none of its components {names} is a loaded module."
MSG_ALREADY = (
    "This {pipeline} is already optimized. Call tgate_compile.restore(pipe) first to optimize it in another way."
)
MSG_DENOISER_TAKEN = (
    "The denoiser of this {pipeline} is already optimized through another pipeline. "
    "Call tgate_compile.restore() on that one first, or give this pipeline a denoiser of its own."
)
MSG_REFUSED = "{pipeline} cannot be gated: {reason}."
MSG_COMPILED = (
    "The denoiser of this {pipeline} has been compiled with torch.compile. Pass it uncompiled: tgate_compile compiles "
    "its own graphs of it."
)
MSG_ONLY_HALF = (
    "keep={given!r} is not possible with {pipeline}: only its {only} half can go on once guidance has stopped. "
    "Leave keep out."
)


def attach(
    pipe: DiffusionPipeline,
    schedules: Mapping[str, Schedule],
    *,
    sites: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    backend: str = "inductor",
    backend_options: Mapping[str, object] | None = None,
    from_bundle: bool = False,
) -> None:
    """Let the denoisers of `pipe` run by `schedules`, which has one for each of `denoiser_names(pipe)`.

    Those whose graphs come `from_bundle` have a backend that `load` has checked.

    Raises:
        ConfigurationError: an argument is wrong. The pipeline is as it was.
        UnsupportedModelError: this pipeline or denoiser cannot be gated. The pipeline is as it was.
    """
    options = {} if backend_options is None else backend_options
    configs = {
        name: Config(
            _with_possible_half(pipe, schedule),
            family=family_of(type(pipe)),
            sites=sites,
            cache_dtype=cache_dtype,
            backend=backend,
            backend_options=options,
        )
        for name, schedule in schedules.items()
    }
    if not from_bundle:
        check_backend(backend, options)
    if state_of(pipe) is not None:
        raise ConfigurationError(MSG_ALREADY.format(pipeline=type(pipe).__name__))
    for name, config in configs.items():
        _check_supported(pipe, getattr(pipe, name), config)
    Optimized(pipe, configs).attach(pipe)


def detach(pipe: DiffusionPipeline) -> None:
    """Undo `attach`.

    Raises:
        ConfigurationError: the pipeline is not optimized.
        ConcurrentGenerationError: it is in the middle of a generation.
    """
    state = required_state_of(pipe)
    if any(hook.busy for hook in state.hooks.values()):
        raise ConcurrentGenerationError(MSG_CONCURRENT)
    state.detach(pipe)


def denoiser_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The components of `pipe` that denoise: one, or two where the family says so.

    Raises:
        ConfigurationError: `pipe` is no pipeline, or has none.
    """
    if not isinstance(pipe, DiffusionPipeline):
        given = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"a {type(pipe).__name__}"
        raise ConfigurationError(MSG_NO_PIPELINE.format(given=given))
    first = [name for name in DENOISER_NAMES if isinstance(getattr(pipe, name, None), torch.nn.Module)][:1]
    if not first:
        raise ConfigurationError(MSG_NO_DENOISER.format(pipeline=type(pipe).__name__, names=", ".join(DENOISER_NAMES)))
    family = family_of(type(pipe))
    second = family.second if boundary_of(pipe, family) is not None else None
    return (*first, second) if second is not None else tuple(first)


def _with_possible_half(pipe: DiffusionPipeline, schedule: Schedule) -> Schedule:
    """`schedule`, keeping the one half that can be kept, if the family has no choice."""
    only = family_of(type(pipe)).only
    if only is None:
        return schedule
    if schedule.keep not in (None, only):
        raise ConfigurationError(MSG_ONLY_HALF.format(given=schedule.keep, pipeline=type(pipe).__name__, only=only))
    return dataclasses.replace(schedule, keep=only)


def _check_supported(pipe: DiffusionPipeline, denoiser: torch.nn.Module, config: Config) -> None:
    pipeline = type(pipe).__name__
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or denoiser._compiled_call_impl is not None:
        raise ConfigurationError(MSG_COMPILED.format(pipeline=pipeline))
    reason = refusal(type(pipe))
    if reason is not None:
        raise UnsupportedModelError(MSG_REFUSED.format(pipeline=pipeline, reason=reason))
    no_cross = type(denoiser).__name__ in JOINT_ATTENTION or denies_cross_attention(denoiser)
    if "cross" in config.schedule.kinds and no_cross:
        raise UnsupportedModelError(MSG_NO_SITES.format(model=type(denoiser).__name__))
    check_patterns(denoiser, config.sites or ())
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK_NAME) is not None:
        raise ConfigurationError(MSG_DENOISER_TAKEN.format(pipeline=pipeline))
    check_weights_stay(denoiser)
    check_quantization(denoiser)
