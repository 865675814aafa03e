"""One generation: from denoiser call to step, phase and variant, with the caches carried along."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._caches import Caches, Layout
from tgate_compile._call import Call
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError, UnsupportedModelError
from tgate_compile._families import Family
from tgate_compile._graphs import Emission
from tgate_compile._halves import check_halves, one_half, similarity
from tgate_compile._latents import latents_of, timestep_of
from tgate_compile._schedule import Half, Kind, Phase, Schedule
from tgate_compile._steps import StepCounter
from tgate_compile._variants import Runnable, Store

logger = logging.getLogger(__name__)

MSG_CONCURRENT = (
    "This pipeline's denoiser is in the middle of another generation. One generation at a time: a pipeline holds its "
    "scheduler's state. Use one pipeline per thread (they may be built from the same weights), or a lock."
)
MSG_AUTOCAST = (
    "torch.autocast is on, and would change dtypes inside a graph that is made for fixed ones. Leave it, and put the "
    "pipeline into the dtype instead: pipe.to(torch.bfloat16), or from_pretrained(..., torch_dtype=torch.bfloat16)."
)
MSG_TWO_CALLS = (
    "The denoiser was called twice for one timestep although {scheduler} has one call per step: this pipeline "
    "evaluates its guidance halves in separate calls, and in which order is not known. "
    "What works instead: the pipeline without tgate_compile."
)
MSG_NO_PAIR = (
    "Guidance is on, and this pipeline's guidance halves come in separate calls, {first} then {second}, but the second "
    "call is for another timestep or for other shapes than the first."
)


class Previewed(Exception):  # noqa: N818 (it is no error)
    """Leaves a pipeline's call at its first denoiser call, and tells what that was."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], guided: bool) -> None:
        super().__init__()
        self.denoiser_args = args
        self.denoiser_kwargs = kwargs
        self.guided = guided


@dataclass(frozen=True)
class Plan:
    """What a generation would run.

    Attributes:
        steps: each step, and what it does.
        graphs: for each step the phase whose graph serves it, and the denoiser call that this is made for.
        cache_bytes: the most that is kept from one timestep to the next.
    """

    steps: list[tuple[int, Phase]]
    graphs: list[tuple[Phase, Call]]
    cache_bytes: int


@dataclass(frozen=True)
class _FirstCall:
    """A timestep of a pipeline with a call for each half, after the first of the two."""

    step: int
    phase: Phase
    arguments: dict[str, Any]
    compiled: Runnable
    outputs: dict[Half, list[torch.Tensor]]


class Generation:
    """The state of one generation of one denoiser, made when it begins and thrown away when it ends.

    Args:
        store: the variants of the denoiser.
        forward: the denoiser's original forward.
        schedule: from step to phase.
        family: what is specific to the pipeline's class.
        guided: called at each step: whether guidance is on.
        scheduler: called at the first denoiser call, when the timesteps are set, and after it.
        num_calls: called likewise: for how many of the timesteps this denoiser is called; None for all.
        watch: look for changes of the denoiser at every call, not only at the first one.
        preview: raise `Previewed` at the first call.
        before: the generation of the denoiser whose steps come before this one's, if there are two.
    """

    def __init__(
        self,
        store: Store,
        forward: Callable[..., Any],
        schedule: Schedule,
        *,
        family: Family,
        guided: Callable[[], bool],
        scheduler: Callable[[], Any],
        num_calls: Callable[[], int | None],
        watch: bool,
        preview: bool = False,
        before: Generation | None = None,
    ) -> None:
        self._store = store
        self._forward = forward
        self._schedule = schedule
        self._family = family
        self._guided = guided
        self._scheduler = scheduler
        self._num_calls = num_calls
        self._watch = watch
        self._preview = preview
        self._before = before
        self._thread = threading.get_ident()
        self._counter: StepCounter | None = None
        self._signature = inspect.signature(forward)
        self._caches = Caches()
        self._first_timestep: Any = None
        self._first_call: _FirstCall | None = None
        self._guidance_over = False
        self._timesteps = 0  # that are done
        self._finished = False
        self.steps: list[tuple[int, Phase]] = []
        self.cache_bytes = 0  # the most that has been kept from one timestep to the next

    def finish(self) -> None:
        """Free the caches; what ran is still told by `steps`. May be called again."""
        if self._finished:
            return
        self._finished = True
        self._caches.clear()
        self._first_timestep = None
        self._first_call = None
        if self.steps:
            logger.info("%s ran %s", type(self._store.denoiser).__name__, strip_of(self.steps))

    @torch.no_grad()
    def denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for the denoiser's forward."""
        if threading.get_ident() != self._thread:
            raise ConcurrentGenerationError(MSG_CONCURRENT)
        guided = self._guided()
        if self._preview:
            raise Previewed(args, kwargs, guided)
        arguments = self._signature.bind(*args, **kwargs).arguments
        if self._counter is None:
            self._begin(arguments, guided)
        else:
            self._go_on(arguments)
        call = Call.of(args, kwargs)
        if self._separate(guided):
            return self._in_two_calls(call, arguments)
        return self._in_one_call(call, latents_of(arguments).shape, guided)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], guided: bool) -> Plan:
        """Make the variants for a generation that begins with this denoiser call, without running any."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        counter = self._begin(arguments, guided)
        call, batch = Call.of(args, kwargs), latents_of(arguments).shape[0]
        sizes: dict[Kind, int] = {}
        most = 0
        graphs = []
        steps = list(enumerate(self._schedule.plan(counter.num_steps, guided=guided)))
        for _, phase in steps:
            half = self._family.calls[0] if self._separate(guided) and phase.guided else None
            inputs = self._kept(call, batch) if guided and not phase.guided and not self._separate(guided) else call
            graphs.append((self._graph(phase, half), inputs))
            emitted = self._store.emitted(*graphs[-1], self._forward)
            for kind in phase.emit | phase.merge:
                of_kind = [emission for emission in emitted if emission.site.kind == kind]
                size = sum(e.nbytes for e in of_kind if half or e.merged == (kind in phase.merge))
                sizes[kind] = 2 * size if half and kind in phase.emit else size
            most = max(most, sum(sizes.values()))
        return Plan(steps, graphs, most)

    def _begin(self, arguments: dict[str, Any], guided: bool) -> StepCounter:
        """At the first denoiser call: count the steps, check the inputs, look at the denoiser."""
        latents = latents_of(arguments)
        if torch.is_autocast_enabled(latents.device.type):
            raise ConfigurationError(MSG_AUTOCAST)
        self._counter = StepCounter.of(self._scheduler(), self._num_calls())
        self._first_timestep = timestep_of(arguments)
        if guided and not self._family.calls:
            check_halves(latents, same=self._family.only is None)
        if self._before is not None:
            self._before.finish()  # so that the caches of both are never there at a time
        self._store.refresh()
        return self._counter

    def _go_on(self, arguments: dict[str, Any]) -> None:
        """At every further call."""
        if self._timesteps == 1 and not self._family.calls:
            self._check_one_call_per_step(timestep_of(arguments))
        if self._watch:
            self._store.refresh()

    def _separate(self, guided: bool) -> bool:
        return guided and bool(self._family.calls)

    def _in_one_call(self, call: Call, latents: torch.Size, guided: bool) -> Any:
        """A timestep of a pipeline that has guidance off, or both halves in one call, with `latents` of this shape."""
        step, phase = self._next_step(guided)
        if guided and not phase.guided:
            call = self._kept(call, latents[0])
        compiled, outputs = self._run(step, phase, call, None)
        if phase.guided:
            self._after_guided_step(outputs, latents)
        elif guided:
            # uncond + scale * (cond - uncond) is then the prediction itself, whatever the scale, and guidance
            # rescale is the identity: the pipeline's own arithmetic stays as it is.
            outputs = [torch.cat([output, output]) for output in outputs]
        self._end_timestep()
        return compiled.unflatten(outputs)

    def _in_two_calls(self, call: Call, arguments: dict[str, Any]) -> Any:
        """One of the two calls of a timestep of a pipeline that evaluates the guidance halves one by one.

        Once guidance has stopped, the first call computes, and the second is handed what the first has computed.
        """
        first, second = self._family.calls
        if self._first_call is None:
            step, phase = self._next_step(True)
            compiled, outputs = self._run(step, phase, call, first if phase.guided else None)
            halves = {first: outputs} if phase.guided else {first: outputs, second: outputs}
            self._first_call = _FirstCall(step, phase, arguments, compiled, halves)
            return compiled.unflatten(halves[first])
        made, self._first_call = self._first_call, None
        _check_pair(made.arguments, arguments, self._family.calls, values=self._timesteps == 0)
        halves = dict(made.outputs)
        if made.phase.guided:
            compiled, halves[second] = self._run(made.step, made.phase, call, second)
            for emission in compiled.emitted:
                if emission.site.kind in made.phase.merge:
                    self._caches.merge((emission.site.kind, emission.site.name), self._schedule.anchor_weight)
            both = [torch.cat(pair) for pair in zip(halves["uncond"], halves["cond"], strict=True)]
            self._after_guided_step(both, latents_of(arguments).shape)
        self._end_timestep()
        return made.compiled.unflatten(halves[second])

    def _next_step(self, guided: bool) -> tuple[int, Phase]:
        """The step, and what it does; `guided` is what the pipeline says now, since a callback may change it."""
        assert self._counter is not None
        step = self._counter.step(self._timesteps)
        plan = self._schedule.plan(self._counter.num_steps, guided=guided and not self._guidance_over)
        phase = plan[min(step, self._counter.num_steps - 1)]
        for kind in phase.reuse:
            # A callback that switches guidance off keeps the prompt's half, as diffusers' own do.
            keep = self._schedule.kept if guided else "cond"
            self._caches.fit(kind, guided=phase.guided, keep=keep, order=self._family.order)
        return step, phase

    def _end_timestep(self) -> None:
        self._timesteps += 1
        self.cache_bytes = max(self.cache_bytes, self._caches.nbytes)

    def _graph(self, phase: Phase, half: Half | None) -> Phase:
        """The phase whose graph serves `phase`, or the call of one `half` in it."""
        if half is not None:
            phase = Phase(False, emit=phase.emit | phase.merge, reuse=phase.reuse)
        return self._schedule.graph(phase)

    def _run(self, step: int, phase: Phase, call: Call, half: Half | None) -> tuple[Runnable, list[torch.Tensor]]:
        """Run the variant of `phase` for one half, or (None) for both or without guidance; keep what it emits."""
        caches = self._caches.values(half)
        compiled = self._store.get(self._graph(phase, half), call, caches, self._forward)
        outputs, emitted = compiled.run(call, caches)
        for emission, value in zip(compiled.emitted, emitted, strict=True):
            kind = emission.site.kind
            wanted = phase.merge if emission.merged else phase.emit
            if kind in (wanted if half is None else phase.emit | phase.merge):
                self._caches.put((kind, emission.site.name), value, _layout(phase, emission, half), half)
        self.steps.append((step, phase))
        return compiled, outputs

    def _after_guided_step(self, predictions: list[torch.Tensor], latents: torch.Size) -> None:
        """See from the `predictions` of both halves whether guidance has done its work."""
        threshold = self._schedule.guidance_similarity
        if threshold is not None:
            self._guidance_over = similarity(predictions[0], channels=latents[1]) >= threshold

    def _kept(self, call: Call, batch: int) -> Call:
        return one_half(call, batch, self._schedule.kept, self._family)

    def _check_one_call_per_step(self, timestep: Any) -> None:
        scheduler = self._scheduler()
        values = torch.as_tensor(scheduler.timesteps).tolist()
        if len(set(values)) < len(values) or self._first_timestep is None:
            return  # second-order schedulers repeat timesteps themselves
        if torch.equal(torch.as_tensor(self._first_timestep), torch.as_tensor(timestep)):
            raise UnsupportedModelError(MSG_TWO_CALLS.format(scheduler=type(scheduler).__name__))


def _layout(phase: Phase, emission: Emission, half: Half | None) -> Layout:
    if half is not None:
        return "separate"
    return "both" if phase.guided and not emission.merged else "one"


def strip_of(steps: Sequence[tuple[int, Phase]]) -> str:
    """What ran, one character a step."""
    return "".join({step: phase.character for step, phase in steps}.values())


def _check_pair(first: dict[str, Any], second: dict[str, Any], calls: Sequence[Half], *, values: bool) -> None:
    """Check that two calls are the halves of one timestep; `values`: not only by their shapes."""
    same = latents_of(first).shape == latents_of(second).shape
    if same and values and timestep_of(first) is not None:
        same = torch.equal(torch.as_tensor(timestep_of(first)), torch.as_tensor(timestep_of(second)))
    if not same:
        raise UnsupportedModelError(MSG_NO_PAIR.format(first=calls[0], second=calls[1]))
