"""`optimize`, `restore` and `generation`: what is put on a pipeline, and taken off again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsIndex, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook

from tgate_compile._backends import check_backend
from tgate_compile._capture import MSG_NO_SITES, cross_attention_modules
from tgate_compile._config import Config
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile._families import DENOISER_NAMES, JOINT_ATTENTION, family_of, refusal
from tgate_compile._generation import MSG_CONCURRENT, Generation
from tgate_compile._offload import HOOK_NAME, after_offload_hook, check_weights_stay
from tgate_compile._schedule import Half, Schedule
from tgate_compile._variants import VariantStore

logger = logging.getLogger(__name__)
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

_ATTRIBUTE = "_tgate_compile"

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
MSG_NOT_OPTIMIZED = "This {pipeline} is not optimized. Call tgate_compile.optimize(pipe, gate_step=10) first."
MSG_REFUSED = "{pipeline} cannot be gated: {reason}."
MSG_COMPILED = (
    "The denoiser of this {pipeline} has been compiled with torch.compile. Pass it uncompiled: tgate_compile compiles "
    "its own graphs of it."
)
MSG_BYPASSED = (
    "The {name} of this {pipeline} ran without tgate_compile: its hook has been taken off since the pipeline was "
    "optimized, as pipe.remove_all_hooks() and enable_model_cpu_offload() do. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)
MSG_NO_GATE = (
    "This call asks for gate_step={gate}, but the pipeline was optimized without a gate. "
    "Call restore(pipe), then optimize(pipe, gate_step=...)."
)
MSG_NO_COPY = (
    "An optimized pipeline or denoiser cannot be copied or pickled. Call tgate_compile.restore(pipe) first; "
    "save_pretrained() works as it is."
)
MSG_REPLACED = (
    "The {name} of this {pipeline} has been replaced since it was optimized. "
    "Call tgate_compile.restore(pipe), then optimize(pipe, ...) again."
)


class DenoiserHook(ModelHook):  # type: ignore[misc]
    """Hands the denoiser's calls to the generation in progress; without one, the denoiser runs as it is."""

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        super().__init__()
        self.store = VariantStore(denoiser, config)
        # The denoiser's own forward: under our hook, and under accelerate's offload hook if there is one already.
        self.own_forward: Callable[..., Any] = (
            denoiser._old_forward if hasattr(denoiser, "_hf_hook") else denoiser.forward  # type: ignore[assignment]
        )
        self.last: Generation | None = None
        self._active: Generation | None = None
        self._lock = threading.Lock()

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        generation = self._active
        if generation is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        args, kwargs = after_offload_hook(module, args, kwargs)
        return generation.denoise(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserHook:
        # A hooked module's `forward` is bound to the original: a copy would silently run the original's weights.
        raise ConfigurationError(MSG_NO_COPY)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        raise ConfigurationError(MSG_NO_COPY)

    @property
    def busy(self) -> bool:
        """Whether a generation is running."""
        return self._lock.locked()

    @contextmanager
    def generation(self, generation: Generation) -> Iterator[None]:
        """Hand the denoiser's calls to `generation` inside the context, however it is left."""
        if not self._lock.acquire(blocking=False):
            raise ConcurrentGenerationError(MSG_CONCURRENT)
        try:
            self._active = generation
            yield
        finally:
            self._active = None
            self.last = generation
            generation.finish()
            self._lock.release()


class Optimized:
    """What `optimize` leaves on a pipeline."""

    def __init__(self, pipe: DiffusionPipeline, denoiser_name: str, config: Config) -> None:
        self.config = config
        self.denoiser_name = denoiser_name
        self.denoiser: torch.nn.Module = getattr(pipe, denoiser_name)
        self.pipeline_class = type(pipe)
        self.hook = DenoiserHook(self.denoiser, config)
        self.had_registry = hasattr(self.denoiser, "_diffusers_hook")
        self.had_forward = "forward" in vars(self.denoiser)
        self.was_offloaded = hasattr(self.denoiser, "_hf_hook")

    def attach(self, pipe: DiffusionPipeline) -> None:
        HookRegistry.check_if_exists_or_initialize(self.denoiser).register_hook(self.hook, HOOK_NAME)
        setattr(pipe, _ATTRIBUTE, self)
        pipe.__class__ = _gated_class(self.pipeline_class)  # type: ignore[arg-type]

    def detach(self, pipe: DiffusionPipeline) -> None:
        pipe.__class__ = self.pipeline_class
        delattr(pipe, _ATTRIBUTE)
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.remove_hook(HOOK_NAME, recurse=False)
        # The registry restores `forward` as an attribute of the instance, and stays behind itself. Hooks that others
        # have put on since then need both.
        if self.was_offloaded and not hasattr(self.denoiser, "_hf_hook"):
            # The offload hook has been taken off meanwhile; the registry remembers its `forward`, which is dead.
            vars(self.denoiser)["forward"] = self.hook.own_forward
        elif not self.had_forward and not registry.hooks:
            vars(self.denoiser).pop("forward", None)
        if not self.had_registry and not registry.hooks:
            del self.denoiser._diffusers_hook


def optimize(
    pipe: Pipeline,
    gate_step: int | float | None = 10,
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
            `pipe(..., gate_step=8)`.
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
    options = {} if backend_options is None else backend_options
    schedule = Schedule(
        gate_step,
        sp_interval=sp_interval,
        fi_interval=fi_interval,
        warm_up=warm_up,
        deepcache_interval=deepcache_interval,
        deepcache_branch=deepcache_branch,
        guidance_step=guidance_step,
        guidance_similarity=guidance_similarity,
        keep=keep,
        anchor_weight=anchor_weight,
        guidance_reuse=guidance_reuse,
    )
    config = Config(schedule, backend=backend, backend_options=options)
    check_backend(config.backend, config.backend_options)
    if state_of(pipe) is not None:
        raise ConfigurationError(MSG_ALREADY.format(pipeline=type(pipe).__name__))
    name = _denoiser_name(pipe)
    _check_supported(pipe, getattr(pipe, name), schedule)
    Optimized(pipe, name, config).attach(pipe)
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


@contextmanager
def generation(
    pipe: DiffusionPipeline,
    *,
    guidance: bool,
    gate_step: int | float | None = None,
    num_timesteps: int | None = None,
) -> Iterator[None]:
    """Run one generation of your own denoising loop through the optimized denoiser.

    The pipeline's call does this itself. Set the scheduler's timesteps before the first denoiser call, and make the
    calls in the order of the timesteps, with the batch [uncond; cond] if guidance is on.

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
def _generation(
    state: Optimized,
    pipe: DiffusionPipeline,
    gate_step: int | float | None,
    guided: Callable[[], bool],
    num_calls: Callable[[], int | None],
    *,
    watch: bool,
) -> Iterator[None]:
    if getattr(pipe, state.denoiser_name) is not state.denoiser:
        raise ConfigurationError(MSG_REPLACED.format(name=state.denoiser_name, pipeline=state.pipeline_class.__name__))
    generation = Generation(
        state.hook.store,
        state.hook.own_forward,
        _schedule(state.config.schedule, gate_step),
        interleaved=family_of(state.pipeline_class).interleaved,
        guided=guided,
        scheduler=lambda: pipe.scheduler,
        num_calls=num_calls,
        watch=watch,
    )
    with state.hook.generation(generation):
        yield


def _schedule(given: Schedule, gate_step: int | float | None) -> Schedule:
    """The schedule of one call, which may have a gate step of its own."""
    if gate_step is None:
        return given
    if given.gate_step is None:
        raise ConfigurationError(MSG_NO_GATE.format(gate=gate_step))
    return dataclasses.replace(given, gate_step=gate_step)


@functools.cache
def _gated_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass with the same name, whose call is one generation. Only optimized objects get it."""
    original = pipeline_class.__call__
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    own = inspect.Parameter("gate_step", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | float | None")
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))

    @functools.wraps(original)
    def call(self: DiffusionPipeline, *args: Any, gate_step: int | float | None = None, **kwargs: Any) -> Any:
        state = required_state_of(self)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        watch = any(bound.arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))
        with _generation(
            state, self, gate_step, _guidance_of(self, bound.arguments), lambda: _num_calls(self), watch=watch
        ):
            result = original(self, *args, **kwargs)
        ran = state.hook.last is not None and state.hook.last.steps
        if not ran and not getattr(self, "_interrupt", False):
            raise ConfigurationError(
                MSG_BYPASSED.format(name=state.denoiser_name, pipeline=state.pipeline_class.__name__)
            )
        return result

    call.__signature__ = signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])  # type: ignore[attr-defined]
    namespace = {"__call__": call, "__module__": pipeline_class.__module__, "__doc__": pipeline_class.__doc__}
    gated = type(pipeline_class.__name__, (pipeline_class,), namespace)
    gated.__qualname__ = pipeline_class.__qualname__
    return gated


def _guidance_of(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Callable[[], bool]:
    """Whether guidance is on, now: the pipeline's own word if it has one, which a callback may change in mid-loop."""
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        return lambda: bool(pipe.do_classifier_free_guidance)
    scale = arguments.get("guidance_scale")
    return lambda: scale is not None and scale > 1.0


def _num_calls(pipe: DiffusionPipeline) -> int | None:
    return getattr(pipe, "_num_timesteps", None)


def _denoiser_name(pipe: DiffusionPipeline) -> str:
    for name in DENOISER_NAMES:
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return name
    raise ConfigurationError(MSG_NO_DENOISER.format(pipeline=type(pipe).__name__, names=", ".join(DENOISER_NAMES)))


def _check_supported(pipe: DiffusionPipeline, denoiser: torch.nn.Module, schedule: Schedule) -> None:
    pipeline = type(pipe).__name__
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or denoiser._compiled_call_impl is not None:
        raise ConfigurationError(MSG_COMPILED.format(pipeline=pipeline))
    reason = refusal(type(pipe))
    if reason is not None:
        raise UnsupportedModelError(MSG_REFUSED.format(pipeline=pipeline, reason=reason))
    has_cross = type(denoiser).__name__ not in JOINT_ATTENTION and cross_attention_modules(denoiser)
    if "cross" in schedule.kinds and not has_cross:
        raise UnsupportedModelError(MSG_NO_SITES.format(model=type(denoiser).__name__))
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK_NAME) is not None:
        raise ConfigurationError(MSG_DENOISER_TAKEN.format(pipeline=pipeline))
    check_weights_stay(denoiser)
