"""Serve an optimized pipeline: views of it for requests, and the graphs that run their denoiser calls together."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from tgate_compile._errors import ConfigurationError, UnsupportedCallError, brief, check_call, check_names, first_line
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, EarlyValues, Runnable, Store
from tgate_compile.engine.trust import Served as TrustedRunner
from tgate_compile.methods.method import Phase
from tgate_compile.passes.graphs import Captured, Emission, Variant
from tgate_compile.pipeline.generation import Generation
from tgate_compile.pipeline.modular import is_modular
from tgate_compile.pipeline.optimized import required_state_of
from tgate_compile.pipeline.two_halves import observed
from tgate_compile.serve import batching
from tgate_compile.serve.adapters import Adapters, Weights, weights_of
from tgate_compile.serve.batching import Memo, Results, Step
from tgate_compile.serve.engine import Engine, NewSizes
from tgate_compile.serve.requests import Request
from tgate_compile.serve.worker import Job, RunApart, Work, batch_sizes, size_of

logger = logging.getLogger(__name__)

MSG_MODULAR = "A {pipeline} is a modular pipeline, which an Engine cannot serve yet. Use an ordinary pipeline."
MSG_OFFLOADED = (
    "The {name} of this {pipeline} is offloaded: its weights move at every call, but an Engine runs several requests "
    "at a time. Remove the offloading (pipe.remove_all_hooks(), then pipe.to(device))."
)
MSG_PARKED = (
    "This {pipeline} was optimized with offload_prelude=True, which moves weights between the prompts of one request. "
    "An Engine serves several at a time. Call restore(pipe), then optimize(pipe, ...) without it."
)
MSG_NEW_SIZE = (
    "No graphs have been compiled for the denoiser's inputs of this request ({sizes}; phases {phases}), and the engine "
    'was started with new_sizes="{policy}". Request a size that the engine was warmed up for, or add a call like this '
    "one to Engine(pipe, warm_up=[...])."
)
MSG_NO_LATENTS = (
    "Latents of shape {shape} of a {pipeline} cannot be decoded on their own: the pipeline has no VAE that decodes "
    "such latents to images."
)


@dataclass(frozen=True)
class _Kind:
    """Identifies a compiled graph that requests need.

    Attributes:
        name: the denoiser.
        phase: the phase of the graph.
        inputs: the form of the first call of a loop.
        images: the number of images, with padding.
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
        self._pipe = pipe
        self._state = required_state_of(pipe)
        _check(pipe, self._state.hooks)
        self._max_batch = max_batch
        self._new_sizes = new_sizes
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

    @property
    def captures(self) -> int:
        """The number of graphs that have been compiled."""
        return sum(getattr(store, "compilations", 0) for store in self._stores.values())

    @property
    def apart(self) -> Mapping[Hashable, str]:
        """The graphs that run one request at a time, each with the reason."""
        return self._apart

    def check(self, call: Mapping[str, Any], lora: Mapping[str, float] | None) -> None:
        """Raise ConfigurationError if the pipeline does not know these arguments or adapters."""
        check_call(call, self._state.pipeline_class)
        if lora is not None:
            check_names(lora, self._adapters.names, "lora: this pipeline")

    def close(self) -> None:
        """Release the pipeline, with the adapters that it had."""
        self.rest()
        self._adapters.restore()
        for gated in self._state.hooks.values():
            gated.hook.end_serving()

    def rest(self) -> None:
        """Free what is kept from batch to batch."""
        self._memo.clear()
        self._early.clear()

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`."""
        vae: Any = getattr(self._pipe, "vae", None)
        processor: Any = getattr(self._pipe, "image_processor", None)
        channels = None if vae is None else vae.config.get("latent_channels")
        factor = None if vae is None else vae.config.get("scaling_factor")
        if processor is None or factor is None or latents.ndim != 4 or latents.shape[1] != channels:
            raise UnsupportedCallError(
                MSG_NO_LATENTS.format(shape=list(latents.shape), pipeline=self._state.pipeline_class.__name__)
            )
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
            latents = latents * std + mean * factor
        with torch.no_grad():
            pixels = vae.decode((latents / factor + (vae.config.get("shift_factor") or 0)).to(vae.dtype)).sample
        images: list[Any] = processor.postprocess(pixels.detach(), output_type="pil")
        return images

    # In a request's thread.

    def run(self, request: Request, engine: Engine) -> Any:
        """Run the pipeline's call for `request`, in whose thread it is called."""
        lora = weights_of(request.lora)
        services = {name: Service(self, name, request, engine, lora) for name in self._stores}
        view: Any = self._state.view(self._pipe, services)
        shown = getattr(self._pipe, "_progress_bar_config", {})
        vars(view)["_progress_bar_config"] = {**shown, "disable": True}  # they would be printed over each other
        self._adapters.use_for_text(lora)
        if request.on_step is None:
            return view(**request.call)
        with observed(view.scheduler, _Steps(request)):
            return view(**request.call)

    def step(
        self, name: str, phase: Phase, call: Call, caches: CachedValues, lora: Weights, *, is_last: bool = False
    ) -> Step:
        """Return the work of a denoiser call."""
        family = self._state.hooks[name].config.family
        form = batching.form_of(call, self._signatures[name], family, guided=phase.guided)
        work = Step(name, phase, call, caches, form, lora, is_last)
        if form is not None and work.place not in self._apart:
            work.key = self._numbers.setdefault((work.place, lora), next(self._next_number))
        return work

    def admit(self, service: Service, generation: Generation, call: Call, guided: bool) -> None:
        """Check that the size of a generation is known or may be captured, and wait until its caches have memory."""
        request, name = service.request, service.name
        request.steps = generation.num_steps
        first = self.step(name, Phase(guided), call, {}, service.lora)
        phases = generation.graphs_ahead(guided)
        images = size_of(first.images, self._max_batch)
        kinds = {_Kind(name, phase, first.place[2], images, service.lora) for phase in phases}
        if self._new_sizes != "capture" and request.records is None and not kinds <= self._known:
            error = UnsupportedCallError(
                MSG_NEW_SIZE.format(
                    sizes=batching.sizes_in_words(call),
                    phases=", ".join(sorted(phase.character for phase in phases)),
                    policy=self._new_sizes,
                )
            )
            if self._new_sizes == "plain":
                generation.allow_plain()
            raise error
        address = name, first.place[2], images, service.lora, generation.schedule, generation.num_steps, guided
        if address not in self._cache_bytes:
            self._cache_bytes[address] = generation.plan_of(call, guided).cache_bytes
        # A batch has a copy of them.
        service.engine.reserve(request, self._cache_bytes[address] * (2 if self._max_batch > 1 else 1))
        self._known |= kinds

    def emissions(self, name: str, phase: Phase, call: Call, lora: Weights) -> tuple[Emission, ...]:
        """Return what the graph of `phase` emits for a call. Called by the worker."""
        work = self.step(name, phase, call, {}, lora)
        with torch.no_grad():
            self._prepare(work)
            if work.form is not None and self._joins(work):
                images = size_of(work.images, self._max_batch)
                call = batching.joined([call], [work.form], images, Memo(), None)
            found = self._stores[name].emitted(phase, call, self._forwards[name])
        self._emitted[work.place, work.images, lora] = found
        return found

    def known_emissions(self, name: str, phase: Phase, call: Call, lora: Weights) -> tuple[Emission, ...] | None:
        """Return what `emissions` has returned for such a call before; None if it has not."""
        work = self.step(name, phase, call, {}, lora)
        return self._emitted.get((work.place, work.images, lora))

    # In the worker's thread.

    def execute(self, works: Sequence[Work]) -> Sequence[Any]:
        """Run works with equal keys together, and return the result of each."""
        first = works[0]
        if isinstance(first, Job):
            return [first.function()]
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
        """Run requests one at a time with the graphs for calls like `work`."""
        if isinstance(work, Step) and work.place not in self._apart:
            self._apart[work.place] = reason
            logger.warning(
                "Requests are run one at a time in the %s graph of %s for %s: %s.",
                work.phase.name, type(self._stores[work.name].denoiser).__name__, batching.sizes_in_words(work.call),
                reason,
            )  # fmt: skip

    def _prepare(self, work: Step) -> None:
        """Activate the adapters of `work`, and let its store check the denoiser for changes, if necessary."""
        if self._adapters.use_for_denoisers(work.lora):
            self._stale |= set(self._stores)
        if work.name in self._stale:
            self._stores[work.name].refresh()
            self._stale.discard(work.name)

    def _run_steps(self, works: Sequence[Step]) -> list[Results]:
        first, *others = works
        if first.form is None or first.place in self._apart or not self._joins(first):
            if others:
                raise RunApart([[position] for position in range(len(works))])
            return [self._alone(first)]
        alike = [batching.shared_equal(first.call, each.call, first.form.rows) for each in works]
        if not all(alike):
            raise RunApart([[at for at, same in enumerate(alike) if same is wanted] for wanted in (True, False)])
        images = size_of(sum(work.images for work in works), self._max_batch)
        compared = self._compared[first.place, images]
        if len(works) == 1:
            # Padding must not matter, which the comparison of a batch of this size has shown.
            return self._joined(works, images if compared else first.images)
        results = self._joined(works, images)
        differing = batching.differing([work.call for work in works], first.form.rows)
        if not any(differing <= known for known in compared):
            singles = [self._run_steps([work])[0] for work in works]
            problem = self._difference(results, singles)
            if problem is not None:
                self.keep_apart(first, f"the results of a batch differ from those of its requests alone by {problem}")
                return singles
            compared.add(differing)
        return results

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
        """Run works as one call, padded to a number of `images`."""
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
        """Run a work by itself, with the inputs as they are."""
        compiled = self._stores[work.name].get(work.phase, work.call, work.caches, self._forwards[work.name])
        outputs, values = compiled.run(work.call, work.caches, self._early)
        return Results(outputs, values, compiled.emitted, compiled.unflatten)

    def _joins(self, work: Step) -> bool:
        """Return whether the denoiser computes the same with a timestep for each row, which is tried once."""
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
                self.keep_apart(work, f"its denoiser does not take a timestep for each image ({problem})")
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
            for work in records.values():
                if isinstance(work, Step) and work.form is not None:
                    for images in batch_sizes(self._max_batch):
                        engine.compute(Job(functools.partial(self._try, work, images)))
        for known in list(self._known):
            self._known |= {replace(known, images=images) for images in batch_sizes(self._max_batch)}

    def _try(self, work: Step, images: int) -> None:
        """Run a batch of `images` like those of `work`, each with other values."""
        assert work.form is not None
        if work.images > images:
            return
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
            self._run_steps(works)


class Service:
    """Serves the calls of one denoiser in one request; it takes the place of the denoiser's store and forward."""

    folder: str | None

    def __init__(self, served: ServedPipeline, name: str, request: Request, engine: Engine, lora: Weights) -> None:
        self.request = request
        self.name = name
        self.engine = engine
        self.lora = lora
        self._served = served
        self._real: Store = served._stores[name]
        self._generation: Generation | None = None
        self.denoiser = self._real.denoiser
        self.folder = self._real.folder
        self.store: Store = self
        self.forward = self._forward_of(served._forwards[name])

    def _forward_of(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function like `own` that lets the worker run it."""

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            plain = functools.partial(
                self._served.plain, self.name, self.lora, args, kwargs, gradients=torch.is_grad_enabled()
            )
            return self.engine.compute(Job(plain), self.request)

        # A generation recognizes the forward of the denoiser's class by this.
        forward.__func__ = getattr(own, "__func__", None)  # type: ignore[attr-defined]
        return forward

    def admit(self, generation: Generation, call: Call, guided: bool) -> None:
        """Wait until the generation may begin its pass."""
        self._generation = generation
        self._served.admit(self, generation, call, guided)

    # As a store.

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of the sites that can be cached, if already known."""
        return self._real.site_names

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants captured in this process, each with the capture that it was derived from."""
        return self._real.variants

    def refresh(self, *, begins: bool = True) -> None:
        """Let the denoiser be checked for changes before the next batch."""
        self._served._stale.add(self.name)

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return what the graph of `phase` emits for inputs like those of `call`, without compiling it."""
        known = self._served.known_emissions(self.name, phase, call, self.lora)
        if known is not None:
            return known
        job = Job(functools.partial(self._served.emissions, self.name, phase, call, self.lora))
        found: tuple[Emission, ...] = self.engine.compute(job, self.request)
        return found

    def get(self, phase: Phase, call: Call, caches: CachedValues, forward: Callable[..., Any]) -> Runnable:
        """Return the results of the graph of `phase` for `call`, computed together with other requests' calls."""
        assert self._generation is not None
        progress = self._generation.progress
        assert progress.counter is not None
        is_last = progress.done + 1 >= progress.counter.num_calls
        work = self._served.step(self.name, phase, call, dict(caches), self.lora, is_last=is_last)
        request = self.request
        request.step, request.phase = progress.counter.step(progress.done), phase.character
        if request.records is not None:
            request.records.setdefault((work.place, self.lora), work)
        rows: Results = self.engine.compute(work, request)
        return rows


class _Steps:
    """Observes the scheduler of a request, to report its steps."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def on_set_timesteps(self) -> None:
        """Do nothing."""

    def on_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Report the step that the request is about to complete."""
        self._request.report(lambda: sample.detach().clone())


def _check(pipe: Any, hooks: Mapping[str, Any]) -> None:
    """Raise ConfigurationError if an engine cannot serve the optimized pipeline `pipe`."""
    name_of_class = type(pipe).__name__
    if is_modular(pipe) or not isinstance(pipe, DiffusionPipeline):
        raise ConfigurationError(MSG_MODULAR.format(pipeline=name_of_class))
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and any(hasattr(each, "_hf_hook") for each in module.modules()):
            raise ConfigurationError(MSG_OFFLOADED.format(name=name, pipeline=name_of_class))
    if any(gated.config.offload_prelude for gated in hooks.values()):
        raise ConfigurationError(MSG_PARKED.format(pipeline=name_of_class))
    batching.check_schedules([gated.config.schedule for gated in hooks.values()])
