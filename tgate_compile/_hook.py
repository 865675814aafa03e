"""The hook on a denoiser: hands its calls to the generation in progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from diffusers.hooks import HookRegistry, ModelHook

from tgate_compile._config import Config
from tgate_compile._errors import ConcurrentGenerationError, ConfigurationError
from tgate_compile._generation import MSG_CONCURRENT, Generation
from tgate_compile._offload import HOOK_NAME, after_offload_hook
from tgate_compile._variants import Store, VariantStore

MSG_NO_COPY = (
    "An optimized pipeline or denoiser cannot be copied or pickled. Call tgate_compile.restore(pipe) first; "
    "save_pretrained() works as it is."
)


class DenoiserHook(ModelHook):  # type: ignore[misc]
    """Hands the denoiser's calls to the generation in progress; without one, the denoiser runs as it is."""

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        self.store: Store = VariantStore(denoiser, config)
        # The denoiser's own forward: under our hook, and under accelerate's offload hook if there is one already.
        self.own_forward: Callable[..., Any] = (
            denoiser._old_forward if hasattr(denoiser, "_hf_hook") else denoiser.forward  # type: ignore[assignment]
        )
        self._had_registry = hasattr(denoiser, "_diffusers_hook")
        self._had_forward = "forward" in vars(denoiser)
        self._was_offloaded = hasattr(denoiser, "_hf_hook")
        self.last: Generation | None = None
        self._active: Generation | None = None
        self._lock = threading.Lock()

    def attach(self) -> None:
        """Put this hook on the denoiser."""
        HookRegistry.check_if_exists_or_initialize(self.denoiser).register_hook(self, HOOK_NAME)

    def detach(self) -> None:
        """Take it off again; hooks that others have put on since then stay."""
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.remove_hook(HOOK_NAME, recurse=False)
        # The registry restores `forward` as an attribute of the instance, and stays behind itself. Hooks that others
        # have put on since then need both.
        if self._was_offloaded and not hasattr(self.denoiser, "_hf_hook"):
            # The offload hook has been taken off meanwhile; the registry remembers its `forward`, which is dead.
            vars(self.denoiser)["forward"] = self.own_forward
        elif not self._had_forward and not registry.hooks:
            vars(self.denoiser).pop("forward", None)
        if not self._had_registry and not registry.hooks:
            del self.denoiser._diffusers_hook

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
