"""The hook on a denoiser, which passes its calls to the generation in progress."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, SupportsIndex
from weakref import WeakValueDictionary

import torch
from diffusers.hooks import HookRegistry, ModelHook

from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import Store
from tgate_compile.engine.config import Config
from tgate_compile.engine.traffic import give_way, running
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import HOOK_NAME, after_offload_hook
from tgate_compile.pipeline.generation import MSG_CONCURRENT, Generation

logger = logging.getLogger(__name__)

MSG_SERVED = (
    "This pipeline's denoiser is served by a tgate_compile.serve.Engine. Submit the call to the engine, or close the "
    "engine first."
)
MSG_NO_COPY = (
    "An optimized pipeline or denoiser cannot be copied or pickled. Call tgate_compile.restore(pipe) first; "
    "save_pretrained() works without that."
)


class DenoiserHook(ModelHook):  # type: ignore[misc]
    """Passes the denoiser's calls to the generation in progress; without one, the denoiser runs unchanged.

    Several pipelines may share the denoiser, and so this hook. One generation runs at a time, unless the denoiser is
    served (`tgate_compile.serve`): then each thread has its own.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        # The denoiser's own forward, below our hook and below accelerate's offload hook if there is one.
        self.own_forward: Callable[..., Any] = (
            denoiser._old_forward if hasattr(denoiser, "_hf_hook") else denoiser.forward  # type: ignore[assignment]
        )
        self._had_registry = hasattr(denoiser, "_diffusers_hook")
        self._had_forward = "forward" in vars(denoiser)
        self._was_offloaded = hasattr(denoiser, "_hf_hook")
        self._stores: WeakValueDictionary[Hashable, VariantStore] = WeakValueDictionary()
        self._pipelines = 0
        self._active: Generation | None = None
        self._of_threads: dict[int, Generation] | None = None  # while the denoiser is served
        self._lock = threading.Lock()
        self._calls_outside = 0

    def attach(self) -> None:
        """Register this hook on the denoiser for one more pipeline."""
        if not self._pipelines:
            HookRegistry.check_if_exists_or_initialize(self.denoiser).register_hook(self, HOOK_NAME)
        self._pipelines += 1

    def detach(self) -> None:
        """Remove the hook after the last pipeline; hooks that others have registered since then stay."""
        self._pipelines -= 1
        if self._pipelines:
            return
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.remove_hook(HOOK_NAME, recurse=False)
        # The registry restores `forward` as an attribute of the instance, and stays on the denoiser. Hooks that others
        # have registered since then need both.
        if self._was_offloaded and not hasattr(self.denoiser, "_hf_hook"):
            # The offload hook has been removed in the meantime; the registry has restored its `forward`, now unused.
            vars(self.denoiser)["forward"] = self.own_forward
        elif not registry.hooks and not self._was_offloaded:
            if self._had_forward:
                vars(self.denoiser)["forward"] = self.own_forward
            else:
                vars(self.denoiser).pop("forward", None)
        if not self._had_registry and not registry.hooks:
            del self.denoiser._diffusers_hook

    def store_for(self, config: Config) -> VariantStore:
        """Return the graphs for `config`, which are shared by pipelines with equivalent configurations."""
        key = VariantStore.key_of(config)
        store = self._stores.get(key)
        if store is None:
            store = self._stores[key] = VariantStore(self.denoiser, config)
        return store

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        generation = self._present
        if generation is None:
            self._note_call_outside()
            with running():
                return self.fn_ref.original_forward(*args, **kwargs)
        args, kwargs = after_offload_hook(module, args, kwargs)
        give_way()
        with running():
            return generation.denoise(args, kwargs)

    def _note_call_outside(self) -> None:
        """Warn at the second call outside of a generation: a custom loop without `generation()` is never gated."""
        self._calls_outside += not torch.is_grad_enabled()
        if self._calls_outside == 2:
            logger.warning(
                "%s has been called outside of its pipeline's call, where nothing is gated. Run your own denoising "
                "loop in `with tgate_compile.generation(pipe, guidance=...)`.",
                type(self.denoiser).__name__,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserHook:
        # A hooked module's `forward` is bound to the original: a copy would silently run the original's weights.
        raise ConfigurationError(MSG_NO_COPY)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        raise ConfigurationError(MSG_NO_COPY)

    @property
    def busy(self) -> bool:
        """Whether a generation is running, or the denoiser is served."""
        return self._lock.locked()

    @property
    def _present(self) -> Generation | None:
        """The generation in progress, or that of this thread while the denoiser is served."""
        return self._active if self._of_threads is None else self._of_threads.get(threading.get_ident())

    @_present.setter
    def _present(self, generation: Generation | None) -> None:
        if self._of_threads is None:
            self._active = generation
        elif generation is not None:
            self._of_threads[threading.get_ident()] = generation
        else:
            self._of_threads.pop(threading.get_ident(), None)

    @contextmanager
    def activated(self, generation: Generation, *, served: bool = False) -> Iterator[None]:
        """Pass the denoiser's calls to `generation` inside the context, and finish it when the context is left.

        `served` means that it is one of the generations of a served denoiser, each in a thread of its own.
        """
        outer = self._present
        if outer is not None and outer.may_be_interrupted and generation.scheduler() is not outer.scheduler():
            try:
                self._present = generation
                yield
            finally:
                self._present = outer
                generation.finish()
            return
        if outer is not None or not (served or self._lock.acquire(blocking=False)):
            raise ConcurrentGenerationError(MSG_CONCURRENT if self._of_threads is None else MSG_SERVED)
        try:
            self._present = generation
            yield
        finally:
            self._present = None
            generation.finish()
            if not served:
                self._lock.release()

    def begin_to_serve(self) -> None:
        """Let each thread have a generation of its own, until `end_serving`.

        Raises:
            ConcurrentGenerationError: a generation is running, or the denoiser is served already.
        """
        if not self._lock.acquire(blocking=False):
            raise ConcurrentGenerationError(MSG_CONCURRENT if self._of_threads is None else MSG_SERVED)
        self._of_threads = {}

    def end_serving(self) -> None:
        """Undo `begin_to_serve`, once no generation is left."""
        self._of_threads = None
        self._lock.release()


class Service(Protocol):
    """Serves the denoiser calls of one request among many.

    Attributes:
        store: provides graphs that are run together with those of other requests.
        forward: the denoiser's own forward, with the same signature, run in turn with the graphs.
    """

    store: Store
    forward: Callable[..., Any]

    def admit(self, generation: Generation, call: Call, guided: bool) -> None:
        """Return once the generation may take memory for its caches; `call` is the first of a pass.

        Raises:
            UnsupportedCallError: it may not.
        """
        ...


class GatedDenoiser:
    """A denoiser as one pipeline uses it: its configuration, its graphs, and its last generation."""

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        self._hook = hook_of(denoiser) or DenoiserHook(denoiser)
        self.denoiser = denoiser
        self.config = config
        self.store: Store = self._hook.store_for(config)
        self.last: Generation | None = None
        self._service: Service | None = None

    def served_by(self, service: Service) -> GatedDenoiser:
        """Return this denoiser for one request among many, which gets its graphs and its results from `service`."""
        own = copy.copy(self)
        own.store, own.last, own._service = service.store, None, service
        return own

    @property
    def admit(self) -> Callable[[Generation, Call, bool], None] | None:
        """Called at the beginning of each pass of a generation; None if the denoiser is not served."""
        return None if self._service is None else self._service.admit

    @property
    def hook(self) -> DenoiserHook:
        """The hook, which pipelines that share the denoiser have in common."""
        return self._hook

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The denoiser's forward without our hook."""
        return self._hook.own_forward if self._service is None else self._service.forward

    @property
    def busy(self) -> bool:
        """Whether a generation is running, of this pipeline or of another one that shares the denoiser."""
        return self._hook.busy

    @property
    def is_attached(self) -> bool:
        """Whether calls of the denoiser go through the hook."""
        forward = vars(self.denoiser).get("forward")
        by_registry = isinstance(forward, functools.partial) and forward.func.__name__ == "new_forward"
        return by_registry and hook_of(self.denoiser) is self._hook

    def attach(self) -> None:
        """Register the hook on the denoiser, if it is not registered yet."""
        self._hook.attach()

    def detach(self) -> None:
        """Remove the hook from the denoiser, if no other pipeline needs it."""
        self._hook.detach()

    @contextmanager
    def activated(self, generation: Generation) -> Iterator[None]:
        """Pass the denoiser's calls to `generation` inside the context, and finish it when the context is left."""
        with self._hook.activated(generation, served=self._service is not None):
            try:
                yield
            finally:
                self.last = generation


def hook_of(denoiser: torch.nn.Module) -> DenoiserHook | None:
    """Return our hook on `denoiser`; None if there is none."""
    registry = getattr(denoiser, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    return hook if isinstance(hook, DenoiserHook) else None
