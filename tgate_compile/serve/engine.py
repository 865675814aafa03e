"""The engine: it accepts requests, runs them side by side, and batches their denoiser calls.

Each request runs the pipeline's own call in a thread of its own. One of these threads at a time runs the pipeline's
code, since tokenizers, text encoders and decoders are not thread-safe. At a denoiser call the thread hands over the
call's inputs and waits for the results. A single worker collects the waiting calls, groups those that one graph can
serve together, and runs the graph once for all of them.

This module knows nothing of tensors. What can be grouped, and how a group is run, is up to a `Served` model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from tgate_compile.serve.requests import EngineStats, Progress, Ticket

#: What to do with a request whose size has not been captured.
NewSizes = Literal["capture", "plain", "refuse"]


class Engine:
    """Serves many requests at a time with one pipeline.

    Use it as a context manager, or call `close`. While it is open, the pipeline itself cannot be called.

    Args:
        pipe: an optimized pipeline (`tgate_compile.optimize`).
        warm_up: arguments of the pipeline's call, one mapping for each kind of request to expect. For each of them,
            the graphs for all batch sizes are compiled, run and checked before the engine is ready, so that no such
            request waits for a compilation later. An entry `lora` is used like that of `submit`.
        max_batch: the largest number of images in a batch. Batches have 1, 2, 4, ... images, up to this number.
        max_waiting: the number of requests that may wait to begin; `submit` raises `EngineBusyError` beyond it.
        max_running: the number of requests that may be in progress; the default is twice `max_batch`.
        memory: the number of bytes that the caches of all requests in progress may take; None sets no limit.
        timeout: the number of seconds that a request may take, waiting included; None sets no limit.
        new_sizes: what to do with a request whose size (or number of images, or guidance) has not been captured:
            `"capture"` captures it while the request waits, `"plain"` runs the request with the plain pipeline, and
            `"refuse"` lets it fail with an `UnsupportedCallError`.

    Raises:
        ConfigurationError: an argument is wrong, or the pipeline is not optimized, or cannot be served.
        ConcurrentGenerationError: the pipeline is in the middle of a call, or is served by another engine.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        warm_up: Iterable[Mapping[str, Any]] = (),
        max_batch: int = 8,
        max_waiting: int = 64,
        max_running: int | None = None,
        memory: int | None = None,
        timeout: float | None = None,
        new_sizes: NewSizes = "capture",
    ) -> None:
        raise NotImplementedError

    @classmethod
    def from_bundle(cls, folder: str | os.PathLike[str], **options: Any) -> Engine:
        """Return an engine for the bundle in `folder`, which needs no PyTorch (`tgate_compile.runtime`).

        `submit` then takes the arguments of `BundlePipeline.__call__`, without `callback`, and results are what that
        call returns.

        Args:
            folder: the folder of a bundle that was exported with `components="all"`.
            options: options of `Engine` (except `new_sizes`), and of `BundlePipeline`.

        Raises:
            BundleError: the bundle is damaged or unsuitable.
            ConfigurationError: an argument is wrong.
        """
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests: it is warmed up, not closing, and its worker runs."""
        raise NotImplementedError

    def submit(
        self,
        call: Mapping[str, Any],
        *,
        lora: Mapping[str, float] | None = None,
        timeout: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Accept a request, and return a ticket for its result.

        Args:
            call: the arguments of the pipeline's call. Generators, if any, must not be shared between requests.
            lora: the weights of loaded LoRA adapters by name; None leaves those that were active when the engine
                started, and an empty mapping uses none.
            timeout: the number of seconds that this request may take; None takes that of the engine.
            on_step: called in the request's thread before each step is completed. The request fails if it raises.
                Keep it short: the other requests' code waits meanwhile.
            request_id: an id for statistics and logs; the default is a number.

        Raises:
            EngineBusyError: too many requests are waiting.
            EngineClosedError: the engine is closed or closing.
            ConfigurationError: the call has arguments that the pipeline does not know, or an adapter is not loaded.
        """
        raise NotImplementedError

    def decode(self, latents: Any) -> list[Any]:
        """Return PIL images of `latents`, as `Progress.latents` returns them. May be called from any thread.

        Raises:
            UnsupportedCallError: the pipeline's latents cannot be decoded on their own.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Return the present state, and totals."""
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop accepting requests, end those that there are, and release the pipeline. May be called again.

        Args:
            drain: whether to let waiting and running requests finish first; otherwise they end before their next step
                with an `EngineClosedError`.
            timeout: the number of seconds after which requests that are not done are ended all the same.
        """
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)
