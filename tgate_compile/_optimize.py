"""`optimize` and `restore`: check a pipeline and the choices, put the hooks on, take them off."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from tgate_compile._backends import check_backend
from tgate_compile._capture import MSG_NO_SITES, check_patterns, denies_cross_attention
from tgate_compile._config import Config
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile._families import DENOISER_NAMES, JOINT_ATTENTION, family_of, refusal
from tgate_compile._generation import MSG_CONCURRENT
from tgate_compile._offload import HOOK_NAME, check_weights_stay
from tgate_compile._optimized import GateStep, Optimized, boundary_of, required_state_of, split_gate_step, state_of
from tgate_compile._schedule import Half, Schedule
from tgate_compile._schedule_file import load_schedule

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

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
MSG_SCHEDULE = "schedule must be a tgate_compile.Schedule or the path of a schedule file, but got {given!r}."
MSG_SCHEDULE_AND_MORE = "A schedule says all about the steps, but {given} is given as well. Give one or the other."
MSG_ONLY_HALF = (
    "keep={given!r} is not possible with {pipeline}: only its {only} half can go on once guidance has stopped. "
    "Leave keep out."
)


def optimize(
    pipe: Pipeline,
    gate_step: GateStep | None = 10,
    *,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 2,
    deepcache_interval: int = 1,
    deepcache_branch: int = 0,
    guidance_step: int | float | None = None,
    guidance_similarity: float | None = None,
    keep: Half | None = None,
    anchor_weight: float = 0.5,
    guidance_reuse: float = 0.0,
    schedule: Schedule | str | os.PathLike[str] | None = None,
    sites: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    backend: str = "inductor",
    backend_options: Mapping[str, object] | None = None,
) -> Pipeline:
    """Make the pipeline's ordinary call skip what no longer matters: T-GATE, DeepCache, or guidance that ends early.

    With T-GATE, `gate_step` steps run in full. The outputs of every cross-attention are cached at the last of them
    (under guidance the mean of the two halves), and from step `gate_step` on a pruned graph runs that has neither the
    cross-attentions nor their weights, at half the batch, since guidance has done its work too.
    Source: arXiv 2404.02747 v1, section 3.2. `Schedule` has the other methods' rules and sources.

    The graphs are captured and compiled at the first call, on its real inputs, and again for new shapes or dtypes.
    They hold no copy of the weights. Outside a pipeline call the denoiser runs as if never optimized.

    Args:
        pipe: a diffusers pipeline with a UNet or transformer that has cross-attentions. It is changed, and returned;
            `restore(pipe)` undoes it.
        gate_step: steps to run in full: a number >= 1, or a fraction of the steps strictly between 0 and 1. A gate at
            or beyond the last step means that nothing is gated; None is no gate. One call may differ:
            `pipe(..., gate_step=8)`. Where two denoisers share the steps (Wan 2.2), each counts its own from 0, and
            a pair gives each its own gate.
        sp_interval: T-GATE v2: before the gate, compute self-attention at every such step only.
        fi_interval: T-GATE v2: the same after the gate.
        warm_up: T-GATE v2: the step, from 0, after which `sp_interval` begins.
        deepcache_interval: compute a UNet's deep part at every such step only (DeepCache), with a gate or without.
        deepcache_branch: the skip connection at which the deep part begins; 0 is the outermost.
        guidance_step: without a gate: guidance stops after so many steps, or such a fraction of them.
        guidance_similarity: without a gate: guidance stops when the two predictions are this similar (Adaptive
            Guidance; costs a synchronization with the device per guided step).
        keep: the guidance half that goes on once guidance has stopped, with its pooled text and other conditioning:
            `"uncond"` or `"cond"`. None is the papers' choice: uncond with a gate, cond without.
        anchor_weight: weight of the cond half in what the gate caches; 0.5 is the paper's mean of the halves, 1 the
            cond half alone, and more goes beyond it.
        guidance_reuse: go on with guidance after it has stopped, by the two predictions' difference in the last
            guided step, at this scale; 0 drops guidance altogether, as the papers do.
        schedule: all of the above in one: a `Schedule`, or a file that `tune` or `save_schedule` has written. The
            other arguments then stay at their defaults.
        sites: cache only the attentions whose names match one of these patterns, as in a shell: `["up_blocks.*"]`.
        cache_dtype: keep the caches in this dtype: half of fp32's memory with `torch.bfloat16`, a quarter with
            `torch.float8_e4m3fn`. None keeps the model's own.
        backend: `"inductor"` (compiled), `"eager"` (the rewritten graphs, uncompiled: no compile time), or `"auto"`
            (the faster one for the device, as measured).
        backend_options: options for the backend, e.g. Inductor's configuration.

    Returns:
        `pipe` itself.

    Raises:
        ConfigurationError: an argument is wrong. The pipeline is as it was.
        UnsupportedModelError: this pipeline or denoiser cannot be gated. The pipeline is as it was.
    """
    if not isinstance(pipe, DiffusionPipeline):
        given = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"a {type(pipe).__name__}"
        raise ConfigurationError(MSG_NO_PIPELINE.format(given=given))
    names = _denoiser_names(pipe)
    choices: dict[str, Any] = {
        "sp_interval": sp_interval,
        "fi_interval": fi_interval,
        "warm_up": warm_up,
        "deepcache_interval": deepcache_interval,
        "deepcache_branch": deepcache_branch,
        "guidance_step": guidance_step,
        "guidance_similarity": guidance_similarity,
        "keep": keep,
        "anchor_weight": anchor_weight,
        "guidance_reuse": guidance_reuse,
    }
    gates = split_gate_step(gate_step, names)
    if schedule is None:
        schedules = {name: Schedule(gate, **choices) for name, gate in gates.items()}
    else:
        schedules = dict.fromkeys(names, _given_schedule(schedule, {"gate_step": gate_step, **choices}))
    schedules = {name: _with_possible_half(pipe, chosen) for name, chosen in schedules.items()}
    options = {} if backend_options is None else backend_options
    configs = {
        name: Config(
            chosen,
            family=family_of(type(pipe)),
            sites=sites,
            cache_dtype=cache_dtype,
            backend=backend,
            backend_options=options,
        )
        for name, chosen in schedules.items()
    }
    check_backend(backend, options)
    if state_of(pipe) is not None:
        raise ConfigurationError(MSG_ALREADY.format(pipeline=type(pipe).__name__))
    for name, config in configs.items():
        _check_supported(pipe, getattr(pipe, name), config)
    Optimized(pipe, configs).attach(pipe)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `optimize`: the pipeline and its denoiser are exactly as they were, and the graphs are freed.

    Raises:
        ConfigurationError: the pipeline is not optimized.
        ConcurrentGenerationError: it is in the middle of a generation.
    """
    state = required_state_of(pipe)
    if state.hook.busy:
        raise ConcurrentGenerationError(MSG_CONCURRENT)
    state.detach(pipe)
    return pipe


def _denoiser_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The components of `pipe` that denoise: one, or two where the family says so."""
    first = [name for name in DENOISER_NAMES if isinstance(getattr(pipe, name, None), torch.nn.Module)][:1]
    if not first:
        raise ConfigurationError(MSG_NO_DENOISER.format(pipeline=type(pipe).__name__, names=", ".join(DENOISER_NAMES)))
    family = family_of(type(pipe))
    second = family.second if boundary_of(pipe, family) is not None else None
    return (*first, second) if second is not None else tuple(first)


def _given_schedule(schedule: object, others: Mapping[str, Any]) -> Schedule:
    """The schedule that is given as an object or as a file, and by nothing else."""
    defaults = inspect.signature(optimize).parameters
    doubled = [name for name, value in others.items() if value != defaults[name].default]
    if doubled:
        raise ConfigurationError(MSG_SCHEDULE_AND_MORE.format(given=", ".join(doubled)))
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, (str, os.PathLike)):
        return load_schedule(Path(schedule))
    raise ConfigurationError(MSG_SCHEDULE.format(given=schedule))


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
