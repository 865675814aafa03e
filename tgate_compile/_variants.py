"""The compiled variants of one denoiser, made when they are first needed."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.export import ShapesCollection
from torch.utils import _pytree as pytree

from tgate_compile._backends import ChosenBackend, Runner, make_backend
from tgate_compile._call import Call
from tgate_compile._capture import capture, deep_layer
from tgate_compile._config import Config
from tgate_compile._fingerprint import fingerprint
from tgate_compile._graphs import Captured, Emission, Variant
from tgate_compile._live_tensors import check_quantization, live_tensors
from tgate_compile._offload import check_weights_stay
from tgate_compile._schedule import Kind, Phase
from tgate_compile.passes.specialize import specialize

logger = logging.getLogger(__name__)

#: Shapes kept at a time; the one used least recently goes first. An image size needs two: batch 2B and B.
MAX_CAPTURES = 16


class Runnable(Protocol):
    """The graph of one phase, ready to run on inputs of one shape."""

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values it hands on, in order."""
        ...

    def run(
        self, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The denoiser's flat outputs for `call`, and the values of `emitted`."""
        ...

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """What the denoiser returns, from its flat outputs."""
        ...


class Store(Protocol):
    """What a generation gets its graphs from."""

    denoiser: torch.nn.Module

    @property
    def folder(self) -> str | None:
        """The bundle that the graphs come from; None if they are made here."""
        ...

    @property
    def site_names(self) -> tuple[str, ...]:
        """What can be cached, as far as is known."""
        ...

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants made here, and what each is made of."""
        ...

    def refresh(self) -> None:
        """Look at the denoiser again, at the start of a generation."""
        ...

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """What the graph of `phase` for inputs like those of `call` hands on; nothing is compiled for it."""
        ...

    def get(
        self, phase: Phase, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], forward: Callable[..., Any]
    ) -> Runnable:
        """The graph of `phase` for inputs like those of `call`; `forward` is the denoiser's original one."""
        ...


@dataclass(frozen=True)
class CompiledVariant:
    """A variant, ready to run on inputs of one shape."""

    variant: Variant
    captured: Captured
    runner: Runner
    weights: Sequence[torch.Tensor]

    @property
    def emitted(self) -> tuple[Emission, ...]:
        """The sites whose values it hands on, in order."""
        return self.variant.emitted

    def run(
        self, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The denoiser's flat outputs for `call`, and the values that the graph emits, in its order."""
        outputs = list(self.runner(self.weights, _inputs(self.variant, self.captured, call, caches)))
        count = self.captured.out_spec.num_leaves
        return outputs[:count], outputs[count:]

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """What the denoiser returns, from its flat outputs."""
        return pytree.tree_unflatten(outputs, self.captured.out_spec)


class VariantStore:
    """Captures and compiled variants of `denoiser`, by phase and by the inputs' shapes.

    A new shape, dtype, device or constant argument is a new capture, with a log line; a denoiser that has changed
    (see `fingerprint`) drops them all.
    """

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        self.denoiser = denoiser
        self._config = config
        branch = config.schedule.deepcache_branch
        self._deep_layer = deep_layer(denoiser, branch) if "deep" in config.schedule.kinds else None
        self._fingerprint: Hashable = None
        self._captures: OrderedDict[Hashable, Captured] = OrderedDict()
        self._variants: dict[tuple[Hashable, Phase], tuple[Variant, Captured]] = {}
        self._compiled: dict[tuple[Hashable, Phase], CompiledVariant] = {}
        self._backends: dict[torch.device, ChosenBackend] = {}
        self.compilations = 0

    @property
    def folder(self) -> None:
        """None: the graphs are made here."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """What can be cached: cross-attentions, then self-attentions; none before the first capture."""
        captured = next(iter(self._captures.values()), None)
        return () if captured is None else tuple(site.name for site in captured.sites)

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants made so far, compiled or not, and what each is made of."""
        return list(self._variants.values())

    @property
    def compiled(self) -> list[CompiledVariant]:
        """The compiled ones."""
        return list(self._compiled.values())

    def refresh(self) -> None:
        """Look at the denoiser again: drop every variant if it changed, and fetch its parameters anew."""
        current = fingerprint(self.denoiser)
        if current != self._fingerprint:
            if self._captures:
                logger.info("%s has changed: capturing it again", type(self.denoiser).__name__)
            self._captures.clear()
            self._variants.clear()
            self._compiled.clear()
            check_weights_stay(self.denoiser)
            check_quantization(self.denoiser)
            self._fingerprint = current
            return
        live = live_tensors(self.denoiser)
        for key, compiled in self._compiled.items():
            self._compiled[key] = dataclasses.replace(compiled, weights=_weights(compiled.variant, live))

    def variant(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Variant, Captured]:
        """The variant of `phase` for inputs like those of `call`, not compiled yet, and what it is made of."""
        key = call.key
        if (key, phase) in self._variants:
            return self._variants[key, phase]
        captured = self._captures.get(key)
        if captured is None:
            captured = self._captures[key] = self._capture(call, forward)
            self._drop_oldest()
        variant = self._specialize(captured, phase)
        self._variants[key, phase] = (variant, captured)
        return variant, captured

    def free_variants(
        self, phases: Sequence[Phase], call: Call, forward: Callable[..., Any], shapes: ShapesCollection | None
    ) -> tuple[list[Variant], Captured]:
        """The variants of `phases` for inputs like those of `call`, but for the sizes in `shapes`; nothing is kept.

        Raises:
            CaptureError: the denoiser's code depends on these sizes.
        """
        captured = self._capture(call, forward, shapes)
        return [self._specialize(captured, phase) for phase in phases], captured

    def _capture(self, call: Call, forward: Callable[..., Any], shapes: ShapesCollection | None = None) -> Captured:
        return capture(
            self.denoiser,
            forward,
            call,
            self._config.schedule.kinds,
            self._deep_layer,
            only=self._config.sites,
            cache_dtype=self._config.cache_dtype,
            shapes=shapes,
        )

    def _specialize(self, captured: Captured, phase: Phase) -> Variant:
        cond_weight = self._config.schedule.anchor_weight
        cond_is_second = self._config.family.order[1] == "cond"
        return specialize(captured, phase, cond_weight if cond_is_second else 1.0 - cond_weight)

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """What the variant of `phase` for inputs like those of `call` hands on; it is captured, but not compiled."""
        return self.variant(phase, call, forward)[0].emitted

    def get(
        self, phase: Phase, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], forward: Callable[..., Any]
    ) -> CompiledVariant:
        """The variant of `phase` for inputs like those of `call`; `forward` is the denoiser's original one."""
        key = call.key
        found = self._compiled.get((key, phase))
        if found is not None:
            self._captures.move_to_end(key)
            return found
        variant, captured = self.variant(phase, call, forward)
        weights = _weights(variant, live_tensors(self.denoiser))
        inputs = _inputs(variant, captured, call, caches)
        device = inputs[0].device
        if device not in self._backends:
            self._backends[device] = make_backend(self._config.backend, self._config.backend_options, device)
        backend = self._backends[device]
        compiled = CompiledVariant(variant, captured, backend.compile(variant, weights, inputs), weights)
        self._compiled[key, phase] = compiled
        self.compilations += 1
        return compiled

    def _drop_oldest(self) -> None:
        if len(self._captures) > MAX_CAPTURES:
            oldest, _ = self._captures.popitem(last=False)
            for key in [key for key in self._variants if key[0] == oldest]:
                del self._variants[key]
                self._compiled.pop(key, None)


def _weights(variant: Variant, live: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    constants = variant.program.constants
    return [live[name] if name in live else constants[name] for name in variant.weights]


def _inputs(
    variant: Variant, captured: Captured, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor]
) -> list[torch.Tensor]:
    by_name = dict(zip(captured.input_names, call.leaves, strict=True))
    reused = [caches[site.kind, site.name] for site in variant.reused]
    return [*(by_name[name] for name in variant.inputs), *reused]
