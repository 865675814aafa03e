"""One generation: from denoiser call to step, phase and variant, with the caches carried along."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch

from tgate_compile._call import Call
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile._schedule import Kind, Phase, Schedule
from tgate_compile._steps import StepCounter
from tgate_compile._variants import VariantStore

MSG_CONCURRENT = (
    "This pipeline's denoiser is in the middle of another generation. One generation at a time: a pipeline holds its "
    "scheduler's state. Use one pipeline per thread (they may be built from the same weights), or a lock."
)
MSG_AUTOCAST = (
    "torch.autocast is on, and would change dtypes inside a graph that is made for fixed ones. Leave it, and put the "
    "pipeline into the dtype instead: pipe.to(torch.bfloat16), or from_pretrained(..., torch_dtype=torch.bfloat16)."
)
MSG_NOT_TWO_HALVES = (
    "Guidance is on, but the denoiser's batch {shape} is not [uncond; cond] over the same latents, so its halves "
    "cannot be merged at the gate. Three-way guidance (InstructPix2Pix) and perturbed guidance (PAG) are not "
    "supported. "
    "What works instead: the pipeline without tgate_compile, or with guidance off."
)
MSG_GUIDANCE_SWITCHED_ON = (
    "Guidance has been switched on in the middle of a generation, and what is cached was made without it. "
    "Switch it on from the start."
)
MSG_TWO_CALLS = (
    "The denoiser was called twice for one timestep although {scheduler} has one call per step: this pipeline "
    "evaluates its guidance halves in separate calls, which is not supported. "
    "What works instead: the pipeline without tgate_compile."
)


class Generation:
    """The state of one generation, made when it begins and thrown away when it ends.

    Args:
        store: the variants of the denoiser.
        forward: the denoiser's original forward.
        schedule: from step to phase.
        interleaved: paths of the keyword arguments whose rows alternate between the halves.
        guided: called at each step: whether guidance is on.
        scheduler: called once, at the first denoiser call, when the timesteps are set.
        num_calls: called likewise: how many of the timesteps the loop visits; None for all.
        watch: look for changes of the denoiser at every call, not only at the first one.
    """

    def __init__(
        self,
        store: VariantStore,
        forward: Callable[..., Any],
        schedule: Schedule,
        *,
        interleaved: Collection[tuple[str, ...]],
        guided: Callable[[], bool],
        scheduler: Callable[[], Any],
        num_calls: Callable[[], int | None],
        watch: bool,
    ) -> None:
        self._store = store
        self._forward = forward
        self._schedule = schedule
        self._interleaved = interleaved
        self._guided = guided
        self._scheduler = scheduler
        self._num_calls = num_calls
        self._watch = watch
        self._thread = threading.get_ident()
        self._counter: StepCounter | None = None
        self._signature = inspect.signature(forward)
        self._caches: dict[tuple[Kind, str], torch.Tensor] = {}
        self._halves: dict[Kind, bool] = {}  # whether the caches of a kind have both guidance halves
        self._first_timestep: Any = None
        self._guidance_over = False
        self._last_guided: list[torch.Tensor] = []  # the predictions of the last guided step, both halves
        self._calls = 0
        self.steps: list[tuple[int, Phase]] = []

    def finish(self) -> None:
        """Free the caches; what ran is still told by `steps`."""
        self._caches = {}
        self._first_timestep = None
        self._last_guided = []

    @torch.no_grad()
    def denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for the denoiser's forward."""
        if threading.get_ident() != self._thread:
            raise ConcurrentGenerationError(MSG_CONCURRENT)
        arguments = self._signature.bind(*args, **kwargs).arguments
        latents = next(iter(arguments.values()))
        guided = self._guided()
        if self._counter is None:
            if torch.is_autocast_enabled(latents.device.type):
                raise ConfigurationError(MSG_AUTOCAST)
            self._counter = StepCounter.of(self._scheduler(), self._num_calls())
            self._first_timestep = arguments.get("timestep")
            if guided:
                _check_halves(latents)
            self._store.refresh()
        else:
            if self._calls == 1:
                self._check_one_call_per_step(arguments.get("timestep"))
            if self._watch:
                self._store.refresh()
        call = Call.of(args, kwargs)
        step = self._counter.step(self._calls)
        phase = self._phase(step, guided and not self._guidance_over)
        if guided and not phase.guided:
            call = self._one_half(call, latents.shape[0])
        compiled = self._store.get(self._schedule.graph(phase), call, self._caches, self._forward)
        outputs, emitted = compiled.run(call, self._caches)
        for emission, value in zip(compiled.variant.emitted, emitted, strict=True):
            kind = emission.site.kind
            if kind in (phase.merge if emission.merged else phase.emit):
                self._caches[kind, emission.site.name] = value
                self._halves[kind] = phase.guided and not emission.merged
        similarity = self._schedule.guidance_similarity
        if phase.guided and similarity is not None:
            self._guidance_over = _similarity(outputs[0], channels=latents.shape[1]) >= similarity
        if phase.guided and self._schedule.guidance_reuse:
            self._last_guided = outputs
        if guided and not phase.guided:
            outputs = self._both_halves(outputs)
        self.steps.append((step, phase))
        self._calls += 1
        return compiled.unflatten(outputs)

    def _phase(self, step: int, guided: bool) -> Phase:
        """What `step` does, given that the pipeline has guidance on or, since a callback may change it, off."""
        assert self._counter is not None
        phase = self._schedule.plan(self._counter.num_steps, guided=guided)[min(step, self._counter.num_steps - 1)]
        for kind in phase.reuse:
            if self._halves[kind] and not phase.guided:
                # Guidance has been switched off in mid-loop: diffusers' own callbacks keep the prompt's half.
                self._caches |= {key: value.chunk(2)[1] for key, value in self._caches.items() if key[0] == kind}
                self._halves[kind] = False
            elif phase.guided and not self._halves[kind]:
                raise ConfigurationError(MSG_GUIDANCE_SWITCHED_ON)
        return phase

    def _one_half(self, call: Call, batch: int) -> Call:
        size = batch // 2
        keep = self._schedule.kept
        rows = slice(size) if keep == "uncond" else slice(size, batch)
        alternate = slice(0, None, 2) if keep == "uncond" else slice(1, None, 2)
        interleaved = [_keyword(call, path) for path in self._interleaved]

        def half(leaf: torch.Tensor) -> torch.Tensor:
            if leaf.ndim == 0 or leaf.shape[0] != batch:
                return leaf  # shared by both halves: a timestep, a mask
            is_interleaved = any(leaf is tensor for tensor in interleaved)
            return leaf[alternate if is_interleaved else rows]

        return call.map_tensors(half)

    def _both_halves(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """[uncond; cond] predictions out of the kept half's.

        Twice the same: uncond + scale * (cond - uncond) is then the prediction itself, whatever the scale, and guidance
        rescale is the identity, so that the pipeline's own arithmetic stays as it is. With guidance reused, the halves
        are as far apart as in the last guided step, times `guidance_reuse`.
        """
        if not self._last_guided:
            return [torch.cat([output, output]) for output in outputs]
        both = []
        for output, last in zip(outputs, self._last_guided, strict=True):
            uncond, cond = last.chunk(2)
            apart = self._schedule.guidance_reuse * (cond - uncond)
            kept_cond = self._schedule.kept == "cond"
            both.append(torch.cat([output - apart, output] if kept_cond else [output, output + apart]))
        return both

    def _check_one_call_per_step(self, timestep: Any) -> None:
        scheduler = self._scheduler()
        values = torch.as_tensor(scheduler.timesteps).tolist()
        if len(set(values)) < len(values) or self._first_timestep is None:
            return  # second-order schedulers repeat timesteps themselves
        if torch.equal(torch.as_tensor(self._first_timestep), torch.as_tensor(timestep)):
            raise UnsupportedModelError(MSG_TWO_CALLS.format(scheduler=type(scheduler).__name__))


def _keyword(call: Call, path: tuple[str, ...]) -> Any:
    """The tensor at `path` of the call's keyword arguments, e.g. ("added_cond_kwargs", "time_ids"), or None."""
    value: Any = call.arguments[1]
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_halves(latents: torch.Tensor) -> None:
    batch = latents.shape[0]
    if batch % 2 or not torch.equal(latents[: batch // 2], latents[batch // 2 :]):
        raise UnsupportedModelError(MSG_NOT_TWO_HALVES.format(shape=list(latents.shape)))


def _similarity(prediction: torch.Tensor, channels: int) -> float:
    """The cosine similarity of the halves of `prediction`, [2B, channels or more, ...]: the least in the batch.

    Source: arXiv 2312.12487, equation 7. Channels beyond the latents' own are a learned variance, and left out.
    """
    uncond, cond = prediction[:, :channels].float().flatten(1).chunk(2)
    return float(torch.cosine_similarity(uncond, cond, dim=1).min())
