"""Attach schedules to a pipeline, and detach them. Everything is checked before anything is changed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile.engine.backends import check_backend
from tgate_compile.engine.capture import MSG_NO_SITES, OF_TOKENS, check_patterns, deep_layer, denies_cross_attention
from tgate_compile.engine.choice import check_can_change_precision, check_computes_in, note_precision
from tgate_compile.engine.config import Config
from tgate_compile.engine.families import DENOISER_NAMES, has_joint_attention, refusal
from tgate_compile.engine.purity import check_python
from tgate_compile.engine.weights import check_quantization, check_weights_stay
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.facts import boundary_of
from tgate_compile.pipeline.generation import MSG_CONCURRENT
from tgate_compile.pipeline.loop import OnUnsupported
from tgate_compile.pipeline.modular import check_guidance, check_loaded, family_of_pipeline, is_modular
from tgate_compile.pipeline.optimized import Optimized, required_state_of, state_of

MSG_NO_PIPELINE = (
    "optimize() needs a loaded diffusers pipeline, or a similar callable object with a scheduler that has timesteps "
    "and a denoiser, but got {given}. For example: "
    "optimize(StableDiffusionPipeline.from_pretrained(...), gate_step=10)."
)
MSG_NO_DENOISER = (
    "{pipeline} has no denoiser called {names}. It has {modules}. If one of these is the denoiser, pass its name: "
    'optimize(pipe, denoiser="...").'
)
MSG_NO_SUCH_DENOISER = "denoiser={given!r}: {pipeline} has no such module. It has {modules}."
MSG_ALREADY = (
    "This {pipeline} is already optimized. To optimize it differently, call tgate_compile.restore(pipe) first."
)
MSG_ON_UNSUPPORTED = 'on_unsupported must be "error" or "plain", but got {given!r}.'
#: The denoisers in pipelines of models with several stages: unCLIP, Kandinsky 2, Würstchen, Stable Cascade.
_STAGES = ("prior", "decoder")

MSG_REFUSED = "{pipeline} cannot be gated: {reason}."
MSG_COMPILED = (
    "The denoiser of this {pipeline} has been compiled with torch.compile. Use the uncompiled denoiser: tgate_compile "
    "compiles its own graphs."
)
MSG_RETURNS_EARLY = (
    "it returns before its first step has run (its call is a generator, or asynchronous), and gating ends when the "
    "call returns. What works instead: your own loop in tgate_compile.generation(pipe, guidance=...)"
)
MSG_OWN_GATE_STEP = (
    "The call of {pipeline} already has an argument gate_step, like the pipelines of other packages for T-GATE. Pass a "
    "pipeline that is not gated yet."
)
MSG_JOINT_IN_BLOCKS = (
    "{pipeline} is a modular pipeline, and {model} has joint attention, whose tokens cannot be frozen there yet. What "
    "works instead: an ordinary pipeline for the same model, or AdaptiveGuidance(step=...), which ends guidance."
)
MSG_NO_REFERENCES = (
    "FrozenReferences keeps the keys and values of reference images in joint attention, which {model} does not have. "
    "Leave it out."
)
MSG_NO_MEAN = (
    "anchor_weight={given} is not possible with {model}: in joint attention the keys and values of the text are "
    "cached, and those of two different texts have no meaningful mean. The prompt's are cached. Omit anchor_weight."
)
MSG_ONLY_HALF = (
    "keep={given!r} is not possible with {pipeline}: only its {only} half can be kept once guidance has stopped. "
    "Omit keep."
)


def attach(
    pipe: DiffusionPipeline,
    schedules: Mapping[str, Schedule],
    *,
    sites: Sequence[str] | None = None,
    cache_dtype: torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "auto",
    backend_options: Mapping[str, object] | None = None,
    on_unsupported: OnUnsupported = "error",
    graph_memory: int | None = None,
    from_bundle: bool = False,
    binding_times: bool | None = None,
    offload_prelude: bool = False,
) -> None:
    """Make the denoisers of `pipe` follow `schedules`, which has one for each of `denoiser_names(pipe)`.

    With `from_bundle`, `load` has already checked the backend.

    Raises:
        ConfigurationError: an argument is wrong. The pipeline is left unchanged.
        UnsupportedModelError: this pipeline or denoiser cannot be gated. The pipeline is left unchanged.
    """
    options = {} if backend_options is None else backend_options
    if on_unsupported not in get_args(OnUnsupported):
        raise ConfigurationError(MSG_ON_UNSUPPORTED.format(given=on_unsupported))
    configs = {
        name: Config(
            with_possible_half(pipe, getattr(pipe, name), schedule),
            family=family_of_pipeline(pipe),
            sites=sites,
            cache_dtype=cache_dtype,
            backend=backend,
            precision=precision,
            backend_options=options,
            graph_memory=graph_memory,
            binding_times=binding_times,
            offload_prelude=offload_prelude,
        )
        for name, schedule in schedules.items()
    }
    if not from_bundle:
        check_backend(backend, options)
        check_computes_in(backend, options, precision)
    if state_of(pipe) is not None:
        raise ConfigurationError(MSG_ALREADY.format(pipeline=type(pipe).__name__))
    plain_because: UnsupportedModelError | None = None
    try:
        for name, config in configs.items():
            _check_supported(pipe, getattr(pipe, name), config)
        if is_modular(pipe):
            check_guidance(pipe, configs)
    except UnsupportedModelError as error:
        if on_unsupported == "error":
            raise
        plain_because = error
    if not from_bundle:
        for name in configs:
            note_precision(getattr(pipe, name), precision)
    Optimized(pipe, configs, on_unsupported=on_unsupported, plain_because=plain_because).attach(pipe)


@contextmanager
def attached(
    pipe: DiffusionPipeline, schedule: Schedule, names: Sequence[str], *, backend: str, precision: str = "auto"
) -> Iterator[None]:
    """Run the denoisers called `names` by one schedule within the context; afterwards the pipeline is plain again.

    Raises:
        What `attach` raises.
    """
    attach(pipe, dict.fromkeys(names, schedule), backend=backend, precision=precision)
    try:
        yield
    finally:
        detach(pipe)


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


def denoiser_names(pipe: DiffusionPipeline, denoiser: str | None = None) -> tuple[str, ...]:
    """Return the names of the components of `pipe` that denoise: one, two in some families, or only `denoiser`.

    `pipe` may be an object of another package, if it is callable and has a scheduler and a denoiser.

    Raises:
        ConfigurationError: `pipe` is not a pipeline, or has no such component.
        UnsupportedModelError: `pipe` has no such component because it is of a class that cannot be gated.
    """
    if is_modular(pipe):
        check_loaded(pipe)
    elif not _is_pipeline(pipe):
        given = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"a {type(pipe).__name__}"
        raise ConfigurationError(MSG_NO_PIPELINE.format(given=given))
    modules = _modules_of(pipe)
    if denoiser is not None:
        if denoiser not in modules:
            raise ConfigurationError(
                MSG_NO_SUCH_DENOISER.format(given=denoiser, pipeline=type(pipe).__name__, modules=_listed(modules))
            )
        return (denoiser,)
    first = [name for name in (*DENOISER_NAMES, *_STAGES) if name in modules][:1]
    if not first:
        reason = refusal(type(pipe))
        if reason is not None:
            raise UnsupportedModelError(MSG_REFUSED.format(pipeline=type(pipe).__name__, reason=reason))
        raise ConfigurationError(
            MSG_NO_DENOISER.format(
                pipeline=type(pipe).__name__, names=" or ".join(DENOISER_NAMES), modules=_listed(modules)
            )
        )
    family = family_of_pipeline(pipe)
    second = family.second if boundary_of(pipe, family) is not None else None
    return (*first, second) if second is not None else tuple(first)


def _is_pipeline(pipe: object) -> bool:
    if isinstance(pipe, DiffusionPipeline):
        return True
    is_object = not isinstance(pipe, type) and hasattr(pipe, "__dict__") and callable(pipe)
    return is_object and hasattr(getattr(pipe, "scheduler", None), "timesteps")


def _modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the loaded modules that are attributes of `pipe`, by name."""
    if is_modular(pipe):
        names = pipe.component_names
    elif isinstance(pipe, DiffusionPipeline):
        names = pipe.components
    else:
        names = [*vars(pipe), *vars(pipe).get("_modules", ())]
    found = {name: getattr(pipe, name, None) for name in dict.fromkeys([*names, *DENOISER_NAMES])}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}


def _listed(modules: Mapping[str, torch.nn.Module]) -> str:
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in modules.items()) or "no loaded modules"


def with_possible_half(pipe: DiffusionPipeline, denoiser: torch.nn.Module, schedule: Schedule) -> Schedule:
    """Return `schedule`, with `keep` set if only one of the halves can be kept.

    That depends on the family, and on the denoiser: the keys and values of two different texts have no meaningful mean,
    so with joint attention those of the prompt are cached.
    """
    only = family_of_pipeline(pipe).only
    caches_text = schedule.needs_cross and has_joint_attention(type(denoiser))
    if caches_text:
        only = "cond"
    if only is None:
        return schedule
    if schedule.keep not in (None, only):
        raise ConfigurationError(MSG_ONLY_HALF.format(given=schedule.keep, pipeline=type(pipe).__name__, only=only))
    schedule = dataclasses.replace(schedule, keep=only)
    if not caches_text or schedule.gate_step is None:
        return schedule
    if schedule.anchor_weight not in (0.5, 1.0):
        raise ConfigurationError(MSG_NO_MEAN.format(given=schedule.anchor_weight, model=type(denoiser).__name__))
    return dataclasses.replace(schedule, anchor_weight=1.0)


def _check_supported(pipe: DiffusionPipeline, denoiser: torch.nn.Module, config: Config) -> None:
    pipeline = type(pipe).__name__
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or denoiser._compiled_call_impl is not None:
        raise ConfigurationError(MSG_COMPILED.format(pipeline=pipeline))
    own_call = type(pipe).__call__
    if "gate_step" in inspect.signature(own_call).parameters:
        raise ConfigurationError(MSG_OWN_GATE_STEP.format(pipeline=pipeline))
    is_async = inspect.iscoroutinefunction(own_call) or inspect.isasyncgenfunction(own_call)
    returns_early = is_async or inspect.isgeneratorfunction(inspect.unwrap(own_call))
    reason = (
        MSG_RETURNS_EARLY
        if returns_early
        else refusal(type(pipe), type(denoiser), caches_cross="cross" in config.schedule.kinds)
    )
    if reason is not None:
        raise UnsupportedModelError(MSG_REFUSED.format(pipeline=pipeline, reason=reason))
    if "reference" in config.schedule.kinds and not has_joint_attention(type(denoiser)):
        raise UnsupportedModelError(MSG_NO_REFERENCES.format(model=type(denoiser).__name__))
    of_tokens = OF_TOKENS & (config.schedule.kinds - config.schedule.optional_kinds)
    if of_tokens and is_modular(pipe) and has_joint_attention(type(denoiser)):
        raise UnsupportedModelError(MSG_JOINT_IN_BLOCKS.format(pipeline=pipeline, model=type(denoiser).__name__))
    may_have_sites = has_joint_attention(type(denoiser)) or not denies_cross_attention(denoiser)
    if config.schedule.needs_cross and not may_have_sites:
        raise UnsupportedModelError(MSG_NO_SITES.format(model=type(denoiser).__name__))
    if "deep" in config.schedule.kinds:
        deep_layer(denoiser, config.schedule.deepcache_branch)
    check_patterns(denoiser, config.sites or ())
    check_weights_stay(denoiser)
    check_quantization(denoiser)
    check_python(denoiser)
    check_can_change_precision(denoiser, config.precision)
