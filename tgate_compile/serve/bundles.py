"""Serve a bundle without PyTorch. Requests take turns at each step."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tgate_compile._errors import ConfigurationError, UnsupportedCallError, check_names
from tgate_compile.bundle.manifest import phase_of
from tgate_compile.runtime._denoiser import Graphs
from tgate_compile.runtime._pipeline import BundlePipeline, Step
from tgate_compile.runtime._session import Session
from tgate_compile.runtime._text_and_images import pil_images
from tgate_compile.serve.engine import Engine
from tgate_compile.serve.requests import Request
from tgate_compile.serve.worker import Job, Work

if TYPE_CHECKING:
    from onnxruntime import OrtValue

#: The arguments of `BundlePipeline.__call__` that a request may have.
ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "latents",
    "height",
    "width",
    "scheduler",
    "gate_step",
    "output",
)


class ServedBundle:
    """A bundle as an engine serves it. Requests take turns at each step; they are not batched.

    Args:
        folder: the folder of the bundle.
        options: options of `BundlePipeline`.

    Raises:
        BundleError: the bundle is damaged or unsuitable.
        ConfigurationError: an option is wrong.
    """

    captures = 0  # the bundle has all graphs

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        check_names(options, ("providers", "threads", "verify"), "Engine.from_bundle")
        self._pipeline = BundlePipeline(folder, **options)

    def check(self, call: Mapping[str, Any], lora: Mapping[str, float] | None) -> None:
        """Raise ConfigurationError if the pipeline does not know these arguments."""
        check_names(call, ARGUMENTS, "call: a bundle's pipeline")
        if lora is not None:
            raise ConfigurationError(
                "A bundle has fixed weights and does not support lora. Export it with the adapter fused, or serve the "
                "pipeline itself."
            )

    def run(self, request: Request, engine: Engine) -> Any:
        """Run the pipeline's call for `request`, in whose thread it is called."""

        def note(step: Step) -> None:
            request.step, request.steps, request.phase = step.number, step.steps, step.letter
            request.report(step.latents.copy)

        graphs = _Turns(self._pipeline, request, engine)
        return self._pipeline.with_graphs(graphs)(**request.call, callback=note)

    def execute(self, works: Sequence[Work]) -> Sequence[Any]:
        """Run works, and return the result of each."""
        return [work.function() for work in works if isinstance(work, Job)]

    def keep_apart(self, work: Work, reason: str) -> None:
        """Do nothing: works are never run together."""

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`."""
        if np.ndim(latents) != 4:
            raise UnsupportedCallError(f"Latents must have four dimensions, but have {np.ndim(latents)}.")
        return pil_images(self._pipeline.decode(latents))

    def warm_up(self, engine: Engine, calls: Sequence[Mapping[str, Any]]) -> None:
        """Make the calls, which opens the graphs that they need."""
        for call in calls:
            self.check(call, None)
            engine.accept(call, None).ticket.result()

    def rest(self) -> None:
        """Do nothing: nothing is kept."""

    def close(self) -> None:
        """Close the graphs."""
        self._pipeline.close()


class _Turns(Graphs):
    """The graphs of a bundle for one request, which an engine's worker runs in turn with those of others."""

    def __init__(self, pipeline: BundlePipeline, request: Request, engine: Engine) -> None:
        vars(self).update(vars(pipeline.graphs))
        self._request = request
        self._engine = engine

    def session(self, name: str) -> Session:
        graph = self._manifest.graphs[name]
        letter = phase_of(graph.phase).character if graph.stage == "step" else ""
        return _Turn(super().session(name), letter, self._request, self._engine)


class _Turn(Session):
    """A session that waits for its turn."""

    def __init__(self, session: Session, letter: str, request: Request, engine: Engine) -> None:
        vars(self).update(vars(session))
        self._letter = letter
        self._request = request
        self._engine = engine

    def run(self, inputs: Mapping[str, OrtValue], *, kept: int = 0) -> list[OrtValue]:
        job = Job(functools.partial(super().run, inputs, kept=kept), letter=self._letter)
        outputs: list[OrtValue] = self._engine.compute(job, self._request)
        return outputs
