"""One generation: it maps each denoiser call to a step, a phase and a variant, and keeps the caches."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._errors import CaptureError, ConcurrentGenerationError, UnsupportedCallError, UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, EarlyValues, Parking, Runnable, Store
from tgate_compile.engine.families import Family
from tgate_compile.engine.halves import batch_of, doubled, latents_of, one_half, rows_of, shared_rows, uncertain_rows
from tgate_compile.engine.tracing import call_of
from tgate_compile.methods.method import REFERENCE, Half, Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.caches import Caches, CacheSizes, Estimates
from tgate_compile.pipeline.decisions import Decisions, parts_of, strip_of
from tgate_compile.pipeline.loop import MSG_FILLS_CACHE, RETURNS_OTHERS, Loop, Previewed, Uncaptured
from tgate_compile.pipeline.progress import Plan, Progress, check_autocast, check_gradients, with_tensor_timestep
from tgate_compile.pipeline.two_halves import (
    MSG_NEVER_GUIDED,
    MSG_NO_PAIR,
    MSG_NO_STEP_SEEN,
    MSG_ORDER_AND_ANCHOR,
    MSG_TWO_CALLS,
    ReferenceRows,
    TwoHalves,
    check_pair,
    copied,
)

logger = logging.getLogger(__name__)

MSG_CONCURRENT = (
    "This pipeline's denoiser is in the middle of another generation. One generation at a time: a pipeline holds its "
    "scheduler's state. Use a lock, or one pipeline per thread: they may share weights, but each needs its own "
    "denoiser, scheduler and tokenizers."
)


@dataclass(frozen=True)
class _FirstCall:
    """The state between the two calls of a timestep, in a pipeline that calls the denoiser once for each half."""

    step: int
    phase: Phase
    arguments: dict[str, Any]
    compiled: Runnable
    outputs: dict[Half, list[torch.Tensor]]


class Generation:
    """The state of one generation of one denoiser, which is discarded when the generation ends.

    A pipeline's call may visit the timesteps several times (FreeInit; one image or ensemble member after the other).
    Each such pass starts without caches and counts its steps from 0.

    Args:
        store: the variants of the denoiser.
        forward: the denoiser's original forward.
        schedule: the schedule, which assigns a phase to each step.
        family: the properties of the pipeline's class.
        guided: returns whether guidance is on; called at each step.
        scheduler: returns the scheduler; called at the first denoiser call, when the timesteps are set, or later.
        num_calls: returns the number of timesteps that this denoiser is called for, or None for all; called like
            `scheduler`.
        watch: whether to check the denoiser for changes at every call, not only at the first one.
        loop: the state shared by the denoisers of the pipeline's call.
        preview: whether to raise `Previewed` at the first call.
        guided_at: returns whether guidance will be on at a timestep, given its index; None if guidance does not
            change.
        before: the generation of the denoiser whose steps precede this one's, if there are two.
        parking: where the weights of preludes and tables go while they are not needed; None leaves them in place.
        admit: called at the beginning of each pass with this generation, the call, and whether it is guided.
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
        loop: Loop,
        preview: bool = False,
        guided_at: Callable[[int], bool] | None = None,
        before: Generation | None = None,
        parking: Parking | None = None,
        admit: Callable[[Generation, Call, bool], None] | None = None,
    ) -> None:
        self._store = store
        self._forward = forward
        self.schedule = schedule
        self._family = family
        self._guided = guided
        self.scheduler = scheduler
        self._num_calls = num_calls
        self._watch = watch
        self._loop = loop
        self._preview = preview
        self._guided_at = guided_at
        self._before = before
        self._admit = admit
        self._thread = threading.get_ident()
        self._signature = inspect.signature(forward)
        self._caches = Caches(schedule.forecasts)
        self._estimates = Estimates(schedule, family.calls, type(store.denoiser).__name__)
        self._decisions = Decisions(schedule.rule)
        self.early = EarlyValues(lambda: getattr(scheduler(), "timesteps", None), parking)
        self._first_call: _FirstCall | None = None
        self._was_guided = False
        self._guidance_over = False
        self._dropped: tuple[Runnable, list[torch.Tensor]] | None = None  # the result of a step without its guidance
        self._halves = TwoHalves(loop, family, scheduler)
        rows = store.image_rows if "reference" in schedule.kinds else None
        self._references = ReferenceRows(rows, type(store.denoiser).__name__)
        self._previewed: Previewed | None = None
        self._shared: frozenset[int] | None = None  # positions of tensors that both halves share, once determined
        self._finished = False
        self.progress = Progress(steps_once=loop.knows_order)
        self.steps: list[tuple[int, Phase]] = []  # the steps of all passes, numbered consecutively
        self.calls_apart = 0  # calls from within callbacks
        self.cache_bytes = 0  # the largest size of the caches kept between two timesteps

    @property
    def num_steps(self) -> int:
        """The number of steps of a pass; 0 before the first one."""
        return 0 if self.progress.counter is None else self.progress.counter.num_steps

    @property
    def may_be_interrupted(self) -> bool:
        """Whether another generation may run now: only within a callback, while this one is paused."""
        return self._loop.paused > 0 and threading.get_ident() == self._thread

    def finish(self) -> None:
        """Free the caches; `steps` is kept. May be called more than once."""
        if self._finished:
            return
        self._finished = True
        self._caches.clear()
        self._estimates.clear()
        self.early.clear()
        self._halves.free()
        self._first_call = self._dropped = None
        if self.steps:
            logger.info("%s ran %s", type(self._store.denoiser).__name__, strip_of(self.steps))

    def denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a denoiser call instead of the denoiser's forward."""
        if threading.get_ident() != self._thread:
            raise ConcurrentGenerationError(MSG_CONCURRENT)
        if self._preview and not self._loop.paused and not self._is_too_early():
            return self._preview_call(args, kwargs)
        if self._loop.paused or self._loop.plain or self._is_too_early():
            self.calls_apart += self._loop.paused > 0
            self.early.bring_back()
            return self._forward(*args, **kwargs)
        try:
            check_gradients(self._signature.bind(*args, **kwargs).arguments)
            with torch.no_grad():
                return self._denoise(args, kwargs)
        except (UnsupportedModelError, CaptureError) as error:
            self._loop.run_plain(error)
        self._caches.clear()
        self.early.clear()
        return self._forward(*args, **kwargs)

    def _preview_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raise `Previewed`, or run the first step in full if it is needed to find the tokens of reference images."""
        self._previewed = self._previewed or Previewed(args, kwargs, self._guided())
        arguments = self._signature.bind(*args, **kwargs).arguments
        call = call_of(self._store.denoiser, args, kwargs, arguments)
        if self._references.knows(self._references.placed(call, batch_of(arguments))):
            raise self._previewed
        self._loop.current = self
        with torch.no_grad():
            return self._forward(*args, **kwargs)

    def _is_too_early(self) -> bool:
        """Return whether this call prepares the loop, such as one that fills a cache with a reference image."""
        return self._family.prepares and self._loop.observable and not self._loop.timesteps_set

    def _denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guided = self._guided()
        arguments = self._signature.bind(*args, **kwargs).arguments
        event = self.progress.event(self.scheduler(), arguments)
        self._loop.current = self
        if event == "new pass":
            self._begin(arguments, guided)
        else:
            if event == "next":
                self._halves.check_unseen()
            if self._watch:
                self.early.bring_back()
                self._store.refresh(begins=False)
        given = args, kwargs
        if getattr(self._forward, "__func__", None) is type(self._store.denoiser).forward:
            given = with_tensor_timestep(type(self._store.denoiser), args, kwargs, arguments)
        call = call_of(self._store.denoiser, *given, arguments)
        call = self._references.placed(call, batch_of(arguments))
        if event == "new pass" and self._admit is not None:
            self._admit(self, call, guided and not self._halves.undecided)
        if event == "again" and self._family.further:
            return self._further(call)
        latents = batch_of(arguments)
        self._halves.see(latents.shape, guided)
        if self._separate(guided):
            if (event == "again") != (self._first_call is not None):
                first, second = self._family.calls
                raise UnsupportedModelError(MSG_NO_PAIR.format(first=first, second=second))
            return self._in_two_calls(call, arguments)
        if event == "again":
            raise UnsupportedModelError(MSG_TWO_CALLS.format(scheduler=type(self.scheduler()).__name__))
        guided = self._halves.served(latents, guided, first=not self.progress.done)
        listed = rows_of(arguments, latents_of(arguments)) is not None
        return self._in_one_call(call, latents.shape, guided, listed=listed)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], guided: bool) -> Plan:
        """Plan a generation that begins with this denoiser call: capture its variants without running them."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.progress.event(self.scheduler(), arguments)
        self._begin(arguments, guided)
        call = self._references.placed(call_of(self._store.denoiser, args, kwargs, arguments), batch_of(arguments))
        return self.plan_of(call, guided and not self._halves.undecided)

    def plan_of(self, call: Call, guided: bool) -> Plan:
        """Plan the pass that has begun with `call`: capture its variants without running them."""
        sizes = CacheSizes(self.schedule, self.num_steps)
        steps, graphs = [], []
        for step, (phase, half, inputs) in enumerate(self._planned(call, guided)):
            steps.append((step, phase))
            graphs.append([(each, inputs) for each in self._graphs(phase, half)])
            emitted = [each for graph, _ in graphs[-1] for each in self._store.emitted(graph, inputs, self._forward)]
            sizes.put(phase.settled(skipped=False) if phase.decided else phase, emitted, half)
        return Plan(steps, graphs, sizes.most)

    def calls_ahead(self, call: Call, guided: bool) -> dict[Phase, Call]:
        """Return the inputs of each graph that the pass that has begun with `call` needs, by the graph's phase."""
        planned = self._planned(call, guided)
        return {graph: inputs for phase, half, inputs in planned for graph in self._graphs(phase, half)}

    def _planned(self, call: Call, guided: bool) -> Iterator[tuple[Phase, Half | None, Call]]:
        """Yield each step's phase, the half that its first call evaluates, and the inputs of its graphs."""
        assert self.progress.counter is not None
        args, kwargs = call.arguments
        batch = batch_of(self._signature.bind(*args, **kwargs).arguments).shape[0]
        counter = self.progress.counter
        kept: dict[bool, Call] = {}  # estimated steps may keep another half
        for step in range(counter.num_steps):
            if self._guided_at is not None:
                guided = self._guided_at(counter.warmup_calls + step * counter.calls_per_step)
            phase, separate = self.schedule.plan(counter.num_steps, guided=guided)[step], self._separate(guided)
            half = self._family.calls[0] if separate and phase.guided else None
            inputs = call
            if guided and not phase.guided and not separate:
                if phase.estimated not in kept:
                    kept[phase.estimated] = self._kept(call, batch, phase)
                inputs = kept[phase.estimated]
            yield phase, half, inputs

    def allow_plain(self) -> None:
        """Let this loop run without gating where it cannot be gated, whatever the pipeline's `on_unsupported`."""
        self._loop.on_unsupported = "plain"

    def check_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Check that the scheduler steps as many latents as the last denoiser call had, or half as many.

        Raises:
            UnsupportedModelError: the numbers do not fit, or contradict what the pipeline reports about guidance.
        """
        try:
            self._check_step(prediction, sample)
        except UnsupportedModelError as error:
            self._loop.run_plain(error)

    def _check_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        if self._references.learn(sample):
            self._caches.drop("reference")
        if self._previewed is not None:
            raise self._previewed
        self._compare_halves(sample.shape)
        if self._separate(self._halves.reported_guided):
            return
        learnt = self._halves.compare(prediction, sample)
        if learnt is None:
            return
        self._was_guided = True
        if learnt.first_is_cond:
            if self.schedule.anchor_weight != 0.5 and "cross" in self.schedule.kinds:
                raise UnsupportedModelError(MSG_ORDER_AND_ANCHOR)
            self._family = dataclasses.replace(self._family, order=("cond", "uncond"))
        if not learnt.served:
            self._caches.merge_halves(self.schedule.anchor_weight)

    def _begin(self, arguments: dict[str, Any], guided: bool) -> None:
        """Begin a pass at its first denoiser call: check the inputs, count the steps, and refresh the store."""
        latents = batch_of(arguments)
        check_autocast(latents)
        self._caches.clear()
        self._estimates.clear()
        self._decisions.begin()
        self.early.clear()
        self._references.begin()
        self._first_call = self._dropped = None
        self._guidance_over = self._was_guided = False
        self.progress.begin(self._num_calls())
        self._halves = TwoHalves(self._loop, self._family, self.scheduler)
        if guided and not self._family.calls:
            self._halves.begin(latents)
        if self._before is not None:
            self._before.finish()  # so that the caches of both never exist at the same time
        self._store.refresh()

    def _separate(self, guided: bool) -> bool:
        return guided and bool(self._family.calls)

    def _in_one_call(self, call: Call, latents: torch.Size, guided: bool, *, listed: bool) -> Any:
        """Run a timestep in one denoiser call: without guidance, or with both halves.

        `latents` is their shape; `listed` means that the denoiser takes and returns a list of rows.
        """
        step, phase = self._next_step(guided)
        if guided and not phase.guided:
            call = self._kept(call, latents[0], phase)
        compiled, outputs = self._run(step, phase, call, None)
        self._loop.gated = self._loop.gated or (guided and not phase.guided)
        prediction = torch.stack(outputs) if listed else outputs[0]
        self._halves.ran(prediction, merged=bool(phase.merge))
        ends = guided and not phase.guided and not phase.estimated
        self._dropped = (compiled, outputs) if ends and self._family.further else None
        if phase.guided:
            uncond, cond = prediction.chunk(2)
            self._halves.predicted(uncond, cond, latents)
            self._estimates.keep_both(outputs)
        elif phase.estimated:
            outputs = self._estimates.both(outputs, step, self.num_steps, self._family.order)
        elif guided and not listed:
            # uncond + scale * (cond - uncond) is then the prediction itself for every scale, and guidance rescale is
            # the identity, so the pipeline's own arithmetic needs no change.
            outputs = [torch.cat([output, output]) for output in outputs]
        self._end_timestep()
        result = compiled.unflatten(outputs)
        return doubled(result) if ends and listed else result

    def _further(self, call: Call) -> Any:
        """Run a further call of a timestep, for a prediction that guidance moves away from.

        Once guidance has stopped, it returns the timestep's prediction, so that their difference is zero.
        """
        if self._dropped is not None:
            compiled, outputs = self._dropped
            return compiled.unflatten([copied(output) for output in outputs])
        compiled, (outputs, _) = self._run_graph(Phase(False), {}, call, Phase(False))
        return compiled.unflatten(outputs)

    def _in_two_calls(self, call: Call, arguments: dict[str, Any]) -> Any:
        """Run one of the two calls of a timestep, in a pipeline that evaluates the guidance halves separately.

        Once guidance has stopped, the first call computes the prediction, and the second returns a copy of it.
        """
        first, second = self._family.calls
        if self._first_call is None:
            step, phase = self._next_step(True)
            compiled, outputs = self._run(step, phase, call, first if phase.guided else None)
            self._loop.gated = self._loop.gated or not phase.guided
            halves = {first: outputs}
            if phase.estimated:
                halves[second] = self._estimates.uncond(outputs, step, self.num_steps, self._family.order)
            elif not phase.guided:  # a copy, since the pipeline may combine the two in place
                halves[second] = [copied(output) for output in outputs]
            self._first_call = _FirstCall(step, phase, arguments, compiled, halves)
            return compiled.unflatten(halves[first])
        made, self._first_call = self._first_call, None
        check_pair(made.arguments, arguments, self._family.calls, values=self.progress.done == 0)
        halves = dict(made.outputs)
        if made.phase.guided:
            compiled, halves[second] = self._run(made.step, made.phase, call, second)
            for emission in compiled.emitted:
                if emission.site.kind in made.phase.merge:
                    self._caches.merge((emission.site.kind, emission.site.name), self.schedule.anchor_weight)
            self._halves.predicted(halves["uncond"][0], halves["cond"][0], latents_of(arguments).shape)
            self._estimates.keep(*(halves[half] for half in self._family.order))
        self._end_timestep()
        return made.compiled.unflatten(halves[second])

    def _next_step(self, guided: bool) -> tuple[int, Phase]:
        """Return the step and its phase; `guided` is reported by the pipeline now, since a callback may change it."""
        assert self.progress.counter is not None
        step = self.progress.step()
        self._compare_halves(None)
        plan = self.schedule.plan(self.progress.counter.num_steps, guided=guided and not self._guidance_over)
        phase = plan[step]
        if guided and not phase.guided and not self._was_guided:
            raise UnsupportedCallError(MSG_NEVER_GUIDED.format(step=step, schedule=self.schedule))
        self._was_guided |= guided
        if phase.estimated and not self._estimates.ready:
            phase = Phase(True)  # guidance has begun later than the generation
        if step == self.schedule.gate(len(plan)):
            self._caches.restart()
        if "reference" in phase.reuse:
            self._cache_references()
        for kind in phase.needed:
            if not self._caches.has(kind):
                continue  # there are no sites of this kind
            # A callback that switches guidance off keeps the prompt's half, as diffusers' own callbacks do.
            keep = self.schedule.kept if guided else "cond"
            self._caches.fit(kind, guided=phase.guided, keep=keep, order=self._family.order)
        return step, phase

    def _cache_references(self) -> None:
        """Compute the keys and values of references now, if it was not known before which tokens they are."""
        for half, (step, phase, call) in self._references.kept.items() if not self._caches.has("reference") else ():
            if not self._references.knows(call):
                raise UnsupportedModelError(MSG_NO_STEP_SEEN)
            call = self._references.known(call)
            if call.image is not None:
                compiled, (_, emitted) = self._run_graph(self._graph(phase, half), {}, call, phase)
                self._caches.keep(compiled.emitted, emitted, phase, half, step, REFERENCE)

    def _end_timestep(self) -> None:
        self.progress.done += 1
        self.cache_bytes = max(self.cache_bytes, self._caches.nbytes)

    def _graph(self, phase: Phase, half: Half | None) -> Phase:
        """Return the phase whose graph serves `phase`, or the call of one `half` in it."""
        if half is not None:
            phase = Phase(False, emit=phase.emit | phase.merge, reuse=phase.reuse)
        return self.schedule.graph_phase(phase)

    def _graphs(self, phase: Phase, half: Half | None) -> list[Phase]:
        """Return the phases of all graphs that `phase` may need: of its parts, if it is decided while it runs."""
        return parts_of(phase, half) if phase.decided else [self._graph(phase, half)]

    def _run(self, step: int, phase: Phase, call: Call, half: Half | None) -> tuple[Runnable, list[torch.Tensor]]:
        """Run the variant of `phase` for one half, for both or without guidance (None), and store what it emits."""
        if phase.decided:
            run = functools.partial(self._run_graph, call=call, phase=phase)
            phase, compiled, outputs = self._decisions.run(step, phase, half, self._caches, run)
        else:
            if "reference" in phase.emit:
                self._references.kept[half] = step, phase, call
            caches = self._caches.values(half, phase.reuse, step)
            compiled, (outputs, emitted) = self._run_graph(self._graph(phase, half), caches, call, phase)
            self._caches.keep(compiled.emitted, emitted, phase, half, step, phase.emit | phase.merge)
            self._decisions.computed(half)
        self.steps.append((self.progress.steps_before + step, phase))
        self._loop.gated = self._loop.gated or bool(phase.reuse)
        return compiled, outputs

    def _run_graph(
        self, graph: Phase, caches: CachedValues, call: Call, phase: Phase
    ) -> tuple[Runnable, tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Run the graph of the phase `graph`, or the denoiser itself if it cannot be captured and need not be.

        It need not be if the graph neither caches nor reuses anything, so that only guidance is dropped, or if the
        step's own `phase` caches references whose place is not known yet, or if it fills a cache of the pipeline's.
        """
        cached = phase.emit | phase.merge | phase.needed
        compiled: Runnable = Uncaptured(self._forward)
        if call.fills_cache and (cached or self._store.folder is not None):
            raise CaptureError(MSG_FILLS_CACHE.format(model=type(self._store.denoiser).__name__))
        if call.fills_cache or (not self._references.knows(call) and not cached - REFERENCE):
            return compiled, compiled.run(call, caches, self.early)
        self.early.prepare((graph, call.key))
        try:
            compiled = self._store.get(graph, call, caches, self._forward)
        except CaptureError as error:
            # No graph can return what this call returns, but later calls may be ordinary ones (FLUX.2-klein-KV).
            served = phase if RETURNS_OTHERS in str(error) else graph
            if served.emit | served.merge | served.needed or self._store.folder is not None:
                raise
            self._loop.note_uncaptured(error)
        return compiled, compiled.run(call, caches, self.early)

    def _compare_halves(self, sample: torch.Size | None) -> None:
        """Determine from the predictions of the last guided step whether guidance can end."""
        threshold = self.schedule.guidance_similarity
        likeness = None if threshold is None else self._halves.likeness(sample)
        if likeness is not None and threshold is not None:
            self._guidance_over = likeness >= threshold

    def _kept(self, call: Call, batch: int, phase: Phase) -> Call:
        kept = "cond" if phase.estimated else self.schedule.kept
        uncertain = uncertain_rows(call, batch)
        if uncertain and self._shared is None:
            self.early.bring_back()
            self._shared = shared_rows(call, batch, kept, self._family, uncertain, self._forward)
        return one_half(call, batch, kept, self._family, self._shared or frozenset())
