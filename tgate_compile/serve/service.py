"""Serve the denoiser calls of one request: a generation gets graphs and results from the engine's worker."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CachedValues, Runnable, Store
from tgate_compile.methods.method import Phase
from tgate_compile.passes.graphs import Captured, Emission, Variant
from tgate_compile.pipeline.generation import Generation
from tgate_compile.serve.batching import Results
from tgate_compile.serve.components import Weights
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.requests import Request
from tgate_compile.serve.worker import Job

if TYPE_CHECKING:
    from tgate_compile.serve.pipelines import ServedPipeline


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
        self.image_rows = self._real.image_rows
        self.folder = self._real.folder
        self.store: Store = self
        self.forward = self._forward_of(served._forwards[name])

    def _forward_of(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that lets the worker run `own`."""

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
        """Return once the generation may begin its pass."""
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
        """Request a check of the denoiser for changes before the next batch."""
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


class Steps:
    """Observes the scheduler of a request, to report its steps."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def on_set_timesteps(self) -> None:
        """Do nothing."""

    def on_step(self, prediction: torch.Tensor, sample: torch.Tensor) -> None:
        """Report the step that the request is about to complete."""
        self._request.report(lambda: sample.detach().clone())
