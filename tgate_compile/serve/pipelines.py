"""Serve an optimized pipeline: views of it for requests, and the graphs that run their denoiser calls together."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch.utils import _pytree as pytree

from tgate_compile._errors import ConfigurationError, UnsupportedCallError, brief, check_call, did_you_mean, first_line
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, EarlyValues, Store
from tgate_compile.engine.trust import Served as TrustedRunner
from tgate_compile.methods.method import Phase
from tgate_compile.passes.graphs import Emission
from tgate_compile.pipeline.generation import Generation
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.pipeline.two_halves import observed
from tgate_compile.serve import batching
from tgate_compile.serve.background import Captures, unavailable
from tgate_compile.serve.batching import Memo, Results, Step
from tgate_compile.serve.components import (
    Adapters,
    ComponentCall,
    Components,
    Weights,
    check_pipeline,
    decoded,
    weights_of,
)
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.requests import IN_BACKGROUND, NewSizes, Request
from tgate_compile.serve.service import Service, Steps
from tgate_compile.serve.worker import Job, RunApart, Work, batch_sizes, size_of

logger = logging.getLogger(__name__)

MSG_NEW_SIZE = (
    "No graphs have been compiled for the denoiser's inputs of this request ({sizes}; phases {phases}), and the engine "
    'was started with new_sizes="{policy}". Request a size that the engine was warmed up for, or prepare this one when '
    "the engine starts: Engine(pipe, warm_up=[...]), or `tgate-compile serve --warm-up-size`."
)
MSG_NOT_YET = (
    "The graphs for the denoiser's inputs of this request ({sizes}) are being captured in the background, and the "
    'engine was started with new_sizes="background-plain".'
)
MSG_NO_BACKGROUND = (
    'new_sizes="{policy}" captures graphs in a child process, which is not possible here: {reason}. Choose '
    'new_sizes="capture", which pauses all requests during a capture, "plain" or "refuse".'
)


@dataclass(frozen=True)
class _Kind:
    """Identifies a compiled graph that requests need.

    Attributes:
        name: the denoiser.
        phase: the phase of the graph.
        inputs: the form of the first call of a loop.
        images: the number of images, including padding.
        lora: the weights of the adapters.
    """

    name: str
    phase: Phase
    inputs: Hashable
    images: int
    lora: Weights


class ServedPipeline:
    """An optimized pipeline as an engine serves it.

    Args:
        pipe: the pipeline.
        max_batch: the largest number of images in a batch.
        new_sizes: as for `Engine`.

    Raises:
        ConfigurationError: the pipeline is not optimized, or cannot be served.
        ConcurrentGenerationError: it is in the middle of a call, or is already being served.
    """

    def __init__(self, pipe: Any, *, max_batch: int, new_sizes: NewSizes) -> None:
        if new_sizes not in get_args(NewSizes):
            known = ", ".join(f'"{name}"' for name in get_args(NewSizes))
            raise ConfigurationError(f"new_sizes must be one of {known}, but got {new_sizes!r}.")
        self._pipe = pipe
        self._state = required_state_of(pipe)
        check_pipeline(pipe, self._state.hooks)
        self._max_batch = max_batch
        self._new_sizes = new_sizes
        self._captures: Captures | None = None
        if new_sizes in IN_BACKGROUND:
            reason = unavailable(gated.denoiser for gated in self._state.hooks.values())
            if reason is not None:
                raise ConfigurationError(MSG_NO_BACKGROUND.format(policy=new_sizes, reason=reason))
            self._captures = Captures()
        self._stores: Mapping[str, Store] = {name: gated.store for name, gated in self._state.hooks.items()}
        self._forwards = {name: gated.own_forward for name, gated in self._state.hooks.items()}
        self._signatures = {name: inspect.signature(forward) for name, forward in self._forwards.items()}
        self._adapters = Adapters(pipe, tuple(self._stores))
        self._stale = set(self._stores)  # the denoisers that have to be checked for changes
        self._early = EarlyValues()
        self._memo = Memo()
        self._numbers: dict[Hashable, int] = {}  # of keys, which take long to compare
        self._next_number = itertools.count()  # several threads take numbers
        self._forms: dict[Hashable, bool] = {}  # whether a call may get a timestep for each row
        self._apart: dict[Hashable, str] = {}  # graphs that run one request at a time, with the reason
        # By graph and number of images: the inputs that differed in a batch that was compared with single runs.
        self._compared: dict[Hashable, set[frozenset[int]]] = defaultdict(set)
        self._known: set[_Kind] = set()  # what has been captured
        self._cache_bytes: dict[Hashable, int] = {}
        self._emitted: dict[Hashable, tuple[Emission, ...]] = {}
        begun = []
        try:
            for gated in self._state.hooks.values():
                gated.hook.begin_to_serve()
                begun.append(gated.hook)
        except BaseException:
            for hook in begun:
                hook.end_serving()
            raise
        self._components = Components(pipe, tuple(self._stores))

    @property
    def captures(self) -> int:
        """The number of graphs that have been compiled."""
        return sum(getattr(store, "compilations", 0) for store in self._stores.values())

    @property
    def apart(self) -> Mapping[Hashable, str]:
        """The graphs and components that run one request at a time, with the reason for each."""
        return self._apart

    def check(self, call: Mapping[str, Any], lora: Mapping[str, float] | None) -> None:
        """Raise ConfigurationError if the pipeline does not know these arguments or adapters."""
        check_call(call, self._state.pipeline_class)
        names = self._adapters.names
        for name in lora or ():
            if name not in names:
                loaded = f"The loaded ones are {', '.join(names)}." if names else "No LoRA is loaded."
                raise ConfigurationError(f'There is no LoRA "{name}".{did_you_mean(name, names)} {loaded}')

    def close(self) -> None:
        """Release the pipeline, and activate the adapters that were active before."""
        if self._captures is not None:
            self._captures.close()
        self.rest()
        self._components.close()
        self._adapters.restore()
        for gated in self._state.hooks.values():
            gated.hook.end_serving()

    def rest(self) -> None:
        """Free what is kept from batch to batch."""
        self._memo.clear()
        self._early.clear()

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`."""
        return decoded(self._pipe, self._state.pipeline_class.__name__, latents)

    # In a request's thread.

    def run(self, request: Request, engine: Engine) -> Any:
        """Run the pipeline's call for `request`, in whose thread it is called."""
        lora = weights_of(request.lora)
        services = {name: Service(self, name, request, engine, lora) for name in self._stores}
        view: Any = self._state.view(self._pipe, services)
        shown = getattr(self._pipe, "_progress_bar_config", {})
        vars(view)["_progress_bar_config"] = {**shown, "disable": True}  # they would be printed over each other
        self._adapters.use_for_text(lora)
        with ExitStack() as stack:
            stack.enter_context(self._components.submitting(functools.partial(engine.compute, request=request)))
            if request.on_step is not None:
                stack.enter_context(observed(view.scheduler, Steps(request)))
            return view(**request.call)

    def step(
        self, name: str, phase: Phase, call: Call, caches: CachedValues, lora: Weights, *, is_last: bool = False
    ) -> Step:
        """Return the work item of a denoiser call."""
        family = self._state.hooks[name].config.family
        form = batching.form_of(call, self._signatures[name], family, guided=phase.guided)
        work = Step(name, phase, call, caches, form, lora, is_last)
        if form is not None and work.place not in self._apart:
            work.key = self._numbers.setdefault((work.place, lora), next(self._next_number))
        return work

    def admit(self, service: Service, generation: Generation, call: Call, guided: bool) -> None:
        """Check that a generation's size is known or may be captured, and wait for memory for its caches."""
        request, name = service.request, service.name
        request.steps = generation.num_steps
        first = self.step(name, Phase(guided), call, {}, service.lora)
        calls = generation.calls_ahead(call, guided)
        images = size_of(first.images, self._max_batch)
        kinds = {_Kind(name, phase, first.place[2], images, service.lora) for phase in calls}
        if not kinds <= self._known:
            self._get_ready(service, generation, calls, images)
        address = name, first.place[2], images, service.lora, generation.schedule, generation.num_steps, guided
        if address not in self._cache_bytes:
            self._cache_bytes[address] = generation.plan_of(call, guided).cache_bytes
        # A batch has a copy of them.
        service.engine.reserve(request, self._cache_bytes[address] * (2 if self._max_batch > 1 else 1))
        self._known |= kinds

    def _get_ready(self, service: Service, generation: Generation, calls: Mapping[Phase, Call], images: int) -> None:
        """Return once the graphs for `calls` may be captured, or have been; raise UnsupportedCallError otherwise."""
        request, sizes = service.request, batching.sizes_in_words(next(iter(calls.values())))
        if self._new_sizes in ("plain", "refuse") and request.records is None:
            phases = ", ".join(sorted(phase.character for phase in calls))
            if self._new_sizes == "plain":
                generation.allow_plain()
            raise UnsupportedCallError(MSG_NEW_SIZE.format(sizes=sizes, phases=phases, policy=self._new_sizes))
        if self._captures is None or not service.engine.ready:
            return  # during a warm-up no other request has to wait
        works = [self.step(service.name, phase, each, {}, service.lora) for phase, each in calls.items()]
        service.engine.compute(Job(functools.partial(self._try_to_join, works)), request)
        pairs = [(work, number) for work in works for number in dict.fromkeys((work.images, images))]
        tasks = self._captures.ask({_address(*pair): self._capture_of(*pair) for pair in pairs})
        if tasks and self._new_sizes == "background-plain" and request.records is None:
            generation.allow_plain()
            raise UnsupportedCallError(MSG_NOT_YET.format(sizes=sizes))
        service.engine.wait(request, tasks)

    def _capture_of(self, work: Step, images: int) -> Callable[[], None]:
        """Return a function that captures the graph for work items like this one, in batches of `images` images."""

        def capture() -> None:
            with torch.no_grad():
                self._prepare(work)
                call = self._joined_call(work, images)
                self._stores[work.name].emitted(work.phase, call, self._forwards[work.name])

        return capture

    def _try_to_join(self, works: Sequence[Step]) -> None:
        """Find out, before graphs are captured, whether these calls can be joined with others. Called by the worker."""
        with torch.no_grad():
            for work in works:
                self._prepare(work)
                if work.form is not None:
                    self._joins(work)

    def _joined_call(self, work: Step, images: int) -> Call:
        """Return the call of `work` as it is in a batch of `images` images, or unchanged if it runs alone."""
        if work.form is None or not self._joins(work):
            return work.call
        return batching.joined([work.call], [work.form], images, Memo(), None)

    def emissions(self, name: str, phase: Phase, call: Call, lora: Weights) -> tuple[Emission, ...]:
        """Return what the graph of `phase` emits for a call. Called by the worker."""
        work = self.step(name, phase, call, {}, lora)
        with torch.no_grad():
            self._prepare(work)
            joined = self._joined_call(work, size_of(work.images, self._max_batch))
            found = self._stores[name].emitted(phase, joined, self._forwards[name])
        self._emitted[work.place, work.images, lora] = found
        return found

    def known_emissions(self, name: str, phase: Phase, call: Call, lora: Weights) -> tuple[Emission, ...] | None:
        """Return what `emissions` has returned for such a call before; None if it has not."""
        work = self.step(name, phase, call, {}, lora)
        return self._emitted.get((work.place, work.images, lora))

    # In the worker's thread.

    def execute(self, works: Sequence[Work]) -> Sequence[Any]:
        """Run work items with equal keys together, and return the result of each."""
        first = works[0]
        if isinstance(first, Job):
            return [first.function()]
        if isinstance(first, ComponentCall):
            results, problem = self._components.run([work for work in works if isinstance(work, ComponentCall)])
            if problem is not None:
                self.keep_apart(first, f"the results of a batch differ from those of separate runs ({problem})")
            return results
        steps = [work for work in works if isinstance(work, Step)]
        with torch.no_grad():
            self._prepare(steps[0])
            return self._run_steps(steps)

    def plain(self, name: str, lora: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool) -> Any:
        """Return what the denoiser itself returns."""
        self._adapters.use_for_denoisers(lora)
        with torch.set_grad_enabled(gradients):
            return self._forwards[name](*args, **kwargs)

    def keep_apart(self, work: Work, reason: str) -> None:
        """Run requests one at a time with the graphs, or the component, for calls like `work`."""
        if isinstance(work, ComponentCall) and work.place not in self._apart:
            self._apart[work.place] = reason
            self._components.keep_apart(work)
            logger.warning("Requests are run one at a time in the %s of this pipeline: %s.", work.component, reason)
        if isinstance(work, Step) and work.place not in self._apart:
            self._apart[work.place] = reason
            logger.warning(
                "Requests are run one at a time in the %s graph of %s for %s: %s.",
                work.phase.name, type(self._stores[work.name].denoiser).__name__, batching.sizes_in_words(work.call),
                reason,
            )  # fmt: skip

    def _prepare(self, work: Step) -> None:
        """Activate the adapters of `work`. If necessary, let its store check the denoiser for changes."""
        if self._adapters.use_for_denoisers(work.lora):
            self._stale |= set(self._stores)
        if work.name in self._stale:
            self._stores[work.name].refresh()
            self._stale.discard(work.name)

    def _run_steps(self, works: Sequence[Step], *, in_place: bool = False) -> list[Results]:
        """Run work items with equal keys. A batch whose graph has not been captured yet runs only with `in_place`."""
        first, *others = works
        if first.form is None or first.place in self._apart or not self._joins(first):
            if others:
                raise RunApart([[position] for position in range(len(works))])
            return [self._alone(first)]
        images = size_of(sum(work.images for work in works), self._max_batch)
        if others and not in_place and not self._is_captured(first, images):
            raise RunApart([[position] for position in range(len(works))])
        alike = [batching.shared_equal(first.call, each.call, first.form.rows) for each in works]
        if not all(alike):
            raise RunApart([[at for at, same in enumerate(alike) if same is wanted] for wanted in (True, False)])
        compared = self._compared[first.place, images]
        if len(works) == 1:
            # A padded batch is used only after the comparison of a batch of this size.
            return self._joined(works, images if compared else first.images)
        results = self._joined(works, images)
        differing = batching.differing([work.call for work in works], first.form.rows)
        if not any(differing <= known for known in compared):
            singles = [self._run_steps([work])[0] for work in works]
            problem = self._difference(results, singles)
            if problem is not None:
                self.keep_apart(first, f"the results of a batch differ from those of separate runs ({problem})")
                return singles
            compared.add(differing)
        return results

    def _is_captured(self, work: Step, images: int) -> bool:
        """Return whether a batch of `images` may run; if not, its graph is being captured in the background."""
        return self._captures is None or not self._captures.ask(
            {_address(work, images): self._capture_of(work, images)}
        )

    def _difference(self, results: Sequence[Results], singles: Sequence[Results]) -> str | None:
        """Return how the results of a batch differ from those of single runs beyond rounding; None if they do not."""
        runner = singles[0].runner
        computed_in = runner.computed_in(singles[0].outputs[0].device) if isinstance(runner, TrustedRunner) else None
        found = (
            batching.distance(result.tensors, single.tensors, computed_in)
            for result, single in zip(results, singles, strict=True)
        )
        return next((problem for problem in found if problem is not None), None)

    def _joined(self, works: Sequence[Step], images: int) -> list[Results]:
        """Run work items as one call, padded to `images` images."""
        first, forms = works[0], [work.form for work in works if work.form is not None]
        call = batching.joined([work.call for work in works], forms, images, self._memo, first.place)
        caches = batching.joined_caches([work.caches for work in works], forms, images, self._memo, first.place)
        compiled = self._stores[first.name].get(first.phase, call, caches, self._forwards[first.name])
        outputs, values = compiled.run(call, caches, self._early)
        rows: list[Results] = []
        start, halves = 0, forms[0].halves
        for form in forms:
            share = functools.partial(batching.share_of, start=start, count=form.images, images=images)
            mine = [share(value, halves=halves) if torch.is_tensor(value) else value for value in outputs]
            kept = [
                share(value, halves=1 if emission.merged else halves)
                for value, emission in zip(values, compiled.emitted, strict=True)
            ]
            rows.append(Results(mine, kept, compiled.emitted, compiled.unflatten, getattr(compiled, "runner", None)))
            start += form.images
        return rows

    def _alone(self, work: Step) -> Results:
        """Run a work item by itself, with unchanged inputs."""
        compiled = self._stores[work.name].get(work.phase, work.call, work.caches, self._forwards[work.name])
        outputs, values = compiled.run(work.call, work.caches, self._early)
        return Results(outputs, values, compiled.emitted, compiled.unflatten)

    def _joins(self, work: Step) -> bool:
        """Return whether the denoiser computes the same with a timestep for each row. This is tested once per form."""
        assert work.form is not None
        address = work.name, work.form.key
        if address not in self._forms:
            call = batching.joined([work.call], [work.form], work.images, Memo(), None)
            pairs = zip(call.leaves, work.call.leaves, strict=True)
            problem = None
            if any(torch.is_tensor(left) and left.shape != right.shape for left, right in pairs):
                try:
                    problem = batching.distance(self._outputs(work, call), self._outputs(work, work.call))
                except Exception as error:  # the denoiser's own code may raise anything
                    problem = first_line(error, named=True)
            if problem is not None:
                self.keep_apart(work, f"the denoiser does not accept a separate timestep for each image ({problem})")
            self._forms[address] = problem is None
        return self._forms[address]

    def _outputs(self, work: Step, call: Call) -> list[torch.Tensor]:
        store, forward = self._stores[work.name], self._forwards[work.name]
        if store.folder is not None:  # the denoiser may have no weights
            return store.get(work.phase, call, work.caches, forward).run(call, work.caches, EarlyValues())[0]
        args, kwargs = call.arguments
        return [leaf for leaf in pytree.tree_leaves(forward(*args, **kwargs)) if torch.is_tensor(leaf)]

    # Before the first request.

    def warm_up(self, engine: Engine, calls: Sequence[Mapping[str, Any]]) -> None:
        """Compile and check the graphs that calls like `calls` need, for all batch sizes."""
        for each in calls:
            if not isinstance(each, Mapping):
                raise ConfigurationError(f"warm_up must be a list of mappings of arguments, but has {brief(each)}.")
            call = dict(each)
            lora = call.pop("lora", None)
            self.check(call, lora)
            records: dict[Hashable, Work] = {}
            engine.accept(call, lora, records=records).ticket.result()
            works = [work for work in records.values() if isinstance(work, Step) and work.form is not None]
            tries = [
                (work, images) for work in works for images in batch_sizes(self._max_batch) if images >= work.images
            ]
            if self._captures is not None and engine.ready:
                for task in self._captures.ask({_address(*each): self._capture_of(*each) for each in tries}):
                    task.wait()
            for work, images in tries:
                engine.compute(Job(functools.partial(self._try, work, images)))
        for known in list(self._known):
            self._known |= {replace(known, images=images) for images in batch_sizes(self._max_batch)}

    def _try(self, work: Step, images: int) -> None:
        """Run a batch of `images` images of the form of `work`, each with different values."""
        assert work.form is not None
        works = [
            replace(
                work,
                call=batching.varied(work.call, work.form, number),
                caches={key: value.roll(number, -1) for key, value in work.caches.items()},
            )
            for number in range(images // work.images)
        ]
        with torch.no_grad():
            self._prepare(work)
            self._run_steps(works, in_place=True)
        if self._captures is not None:
            self._captures.note(_address(work, images))


def _address(work: Step, images: int) -> Hashable:
    """Identify the capture that `work` needs in batches of `images` images."""
    return work.place, images, work.lora
