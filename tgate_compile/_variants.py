"""The compiled variants of one denoiser, made when they are first needed."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.export import ShapesCollection
from torch.utils import _pytree as pytree

from tgate_compile._backends import ChosenBackend, Runner, make_backend
from tgate_compile._call import Call, FreeDims, differing_dims, fits
from tgate_compile._capture import capture, deep_layer
from tgate_compile._config import Config
from tgate_compile._errors import BackendError, CaptureError
from tgate_compile._fingerprint import fingerprint
from tgate_compile._graphs import Captured, Emission, Variant
from tgate_compile._latents import latents_of
from tgate_compile._live_tensors import check_quantization, live_tensors
from tgate_compile._offload import check_weights_stay
from tgate_compile._purity import check_python, check_stateless
from tgate_compile._schedule import Kind, Phase
from tgate_compile._traffic import exclusive
from tgate_compile.passes.specialize import specialize

logger = logging.getLogger(__name__)

#: Estimates of what the graphs take, in bytes: torch.fx's nodes with what is known of their values.
BYTES_PER_NODE = 12_000
#: What all graphs of a denoiser may take, as a part of the machine's memory, unless `graph_memory` says otherwise.
SHARE_OF_MEMORY = 0.25


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


@dataclass(frozen=True)
class _Address:
    """Where a capture is: the denoiser as it was then, and the call that it was made of."""

    model: int
    key: Hashable


@dataclass
class _Held:
    """A capture, and what is known about it.

    Attributes:
        captured: the graph.
        free: the sizes that other calls may have, by the position of the tensor among the call's leaves.
        checked: calls with other sizes for which it was seen to compute what the denoiser does.
        last_used: the number of the generation that used it last.
        nbytes: what it and its variants take, by estimate.
    """

    captured: Captured
    free: FreeDims
    checked: set[Hashable]
    last_used: int
    nbytes: int


class VariantStore:
    """Captures and compiled variants of `denoiser`, by its state, by phase and by the inputs' shapes.

    A new shape, dtype, device or constant argument is a new capture, with a log line; so is a denoiser that has changed
    (see `fingerprint`). Graphs of earlier states and shapes are kept as long as there is room for them.

    Sizes that only some of the inputs have (the length of the text) are left free once a second one has come, and do
    not matter to graphs that do without these inputs.
    """

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        self.denoiser = denoiser
        self._config = config
        self._models: dict[Hashable, int] = {}  # states of the denoiser by their fingerprints
        self._model = -1
        self._stateless: set[int] = set()
        self._captures: OrderedDict[_Address, _Held] = OrderedDict()
        self._variants: dict[tuple[_Address, Phase], Variant] = {}
        self._compiled: dict[tuple[_Address, Phase], CompiledVariant] = {}
        self._found: dict[tuple[_Address, Phase], _Address] = {}  # calls that are served by another call's graph
        self._backends: dict[tuple[int, torch.device], ChosenBackend] = {}  # by state: another one may suit it
        self._generations = 0
        self._said_full = False
        self.compilations = 0

    @staticmethod
    def key_of(config: Config) -> Hashable:
        """What the graphs depend on: pipelines whose configurations agree in it can share a store."""
        schedule = config.schedule
        return (
            schedule.kinds,
            schedule.deepcache_branch,
            schedule.anchor_weight,
            config.family.order,
            config.sites,
            config.cache_dtype,
            config.backend,
            repr(sorted(config.backend_options.items())),
            config.graph_memory,
        )

    @property
    def folder(self) -> None:
        """None: the graphs are made here."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """What can be cached: cross-attentions, then self-attentions; none before the first capture."""
        held = next(iter(self._captures.values()), None)
        return () if held is None else tuple(site.name for site in held.captured.sites)

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants at hand, compiled or not, and what each is made of."""
        return [(variant, self._captures[address].captured) for (address, _), variant in self._variants.items()]

    @property
    def compiled(self) -> list[CompiledVariant]:
        """The compiled ones."""
        return list(self._compiled.values())

    def refresh(self) -> None:
        """Look at the denoiser again, which may have changed, and fetch its parameters anew."""
        self._generations += 1
        current = fingerprint(self.denoiser)
        model = self._models.get(current)
        if model is None:
            check_weights_stay(self.denoiser)
            check_quantization(self.denoiser)
            check_python(self.denoiser)
            model = self._models[current] = len(self._models)
            if self._captures:
                logger.info("%s has changed: capturing it again", type(self.denoiser).__name__)
        live = live_tensors(self.denoiser)
        self._let_go_of_old_tensors(model, live)
        self._model = model
        for key, compiled in self._compiled.items():
            # The graphs of other states let go of the tensors, which may have been replaced.
            weights = _weights(compiled.variant, live) if key[0].model == model else []
            self._compiled[key] = dataclasses.replace(compiled, weights=weights)

    def _let_go_of_old_tensors(self, model: int, live: Mapping[str, torch.Tensor]) -> None:
        """Programs hold parameters, some of which may have been replaced: take the new ones, or drop the program."""
        for address, held in list(self._captures.items()):
            programs = [held.captured.program, *(v.program for key, v in self._variants.items() if key[0] == address)]
            old = [
                (program.state_dict, name)
                for program in programs
                for name, tensor in program.state_dict.items()
                if not _is_same(live.get(name), tensor)
            ]
            if old and address.model != model:
                self._drop(address)
                continue
            for tensors, name in old:
                tensors[name] = live[name]

    def variant(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Variant, Captured]:
        """The variant of `phase` for inputs like those of `call`, not compiled yet, and what it is made of."""
        address = self._address(phase, call, forward)
        return self._variants[address, phase], self._captures[address].captured

    def _address(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> _Address:
        """Where the variant of `phase` for `call` is, which is made if there is none."""
        own = _Address(self._model, call.key)
        address = self._found.get((own, phase))
        if address is None:
            address = self._fitting_variant(phase, call) or self._captured(own, call, forward)
            self._found[own, phase] = address
        held = self._captures[address]
        held.last_used = self._generations
        self._captures.move_to_end(address)
        if (address, phase) not in self._variants:
            with exclusive():
                variant = self._variants[address, phase] = self._specialize(held.captured, phase)
            held.nbytes += BYTES_PER_NODE * len(variant.program.graph.nodes)
        return address

    def _fitting_variant(self, phase: Phase, call: Call) -> _Address | None:
        """A variant of `phase` that can serve `call` although other inputs differ, which it does without."""
        for (address, its_phase), variant in self._variants.items():
            if its_phase == phase and address.model == self._model:
                held = self._captures[address]
                names = held.captured.input_names
                used = {position for position, name in enumerate(names) if name in variant.inputs}
                if fits(call.key, address.key, held.free, used):
                    return address
        return None

    def _captured(self, own: _Address, call: Call, forward: Callable[..., Any]) -> _Address:
        """Where there is a capture for `call`, which is made if there is none."""
        mine = [(address, held) for address, held in self._captures.items() if address.model == self._model]
        for address, held in mine:
            if fits(call.key, address.key, held.free):
                return address
        # As torch.compile does: a size is taken for fixed until it has been another one.
        free = next((dims for address, _ in mine if (dims := differing_dims(call.key, address.key))), {})
        with exclusive():
            self._check_stateless(call, forward)
            made = self._free_capture(call, forward, free) if free else None
            if made is None:
                made = self._held(self._capture(call, forward), {})
                made.checked.add(call.key)
        self._captures[own] = made
        self._make_room()
        return own

    def _free_capture(self, call: Call, forward: Callable[..., Any], free: FreeDims) -> _Held | None:
        """A capture with these sizes left open; None if the denoiser's code does not permit it."""
        if _latents_of(call, forward) in free:
            return None
        copy = call.map_tensors(torch.Tensor.clone)  # ShapesCollection knows tensors by identity
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]
        for position, dims in free.items():
            shapes[copy.leaves[position]] = dict.fromkeys(dims, torch.export.Dim.AUTO)
        try:
            captured = self._capture(copy, forward, shapes)
        except CaptureError as error:
            logger.debug("%s cannot leave sizes free: %s", type(self.denoiser).__name__, error)
            return None
        inputs = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.op == "placeholder"}
        still_free = {
            position: tuple(
                dim for dim in dims if isinstance(inputs[captured.input_names[position]].shape[dim], torch.SymInt)
            )
            for position, dims in free.items()
        }
        return self._held(captured, still_free) if all(still_free.values()) else None

    def _held(self, captured: Captured, free: FreeDims) -> _Held:
        return _Held(captured, free, set(), self._generations, BYTES_PER_NODE * len(captured.program.graph.nodes))

    def _check_stateless(self, call: Call, forward: Callable[..., Any]) -> None:
        """Before the first capture of a denoiser in this state."""
        if self._model in self._stateless:
            return
        args, kwargs = call.arguments

        def run() -> None:
            with torch.no_grad(), torch.random.fork_rng():
                forward(*args, **kwargs)

        check_stateless(self.denoiser, run)
        self._stateless.add(self._model)

    @exclusive()
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
        schedule = self._config.schedule
        return capture(
            self.denoiser,
            forward,
            call,
            schedule.kinds,
            deep_layer(self.denoiser, schedule.deepcache_branch) if "deep" in schedule.kinds else None,
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
        address = self._address(phase, call, forward)
        held = self._captures[address]
        try:
            compiled = self._compiled.get((address, phase)) or self._compile(address, phase, call, caches)
            # The first step of a generation is a full one, so that others follow a call that has been checked.
            if phase.reuse or call.key in held.checked or self._is_right(compiled, call, caches, forward):
                if not phase.reuse:
                    held.checked.add(call.key)
                return compiled
        except BackendError:
            if not held.free:
                raise
        return self._without_free_sizes(address, phase, call, caches, forward)

    def _compile(
        self, address: _Address, phase: Phase, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor]
    ) -> CompiledVariant:
        variant, held = self._variants[address, phase], self._captures[address]
        weights = _weights(variant, live_tensors(self.denoiser))
        inputs = _inputs(variant, held.captured, call, caches)
        chosen = self._model, inputs[0].device
        if chosen not in self._backends:
            self._backends[chosen] = make_backend(self._config.backend, self._config.backend_options, chosen[1])
        runner = self._backends[chosen].compile(variant, weights, inputs)
        compiled = self._compiled[address, phase] = CompiledVariant(variant, held.captured, runner, weights)
        self.compilations += 1
        if self._backends[chosen].packs_weights:
            held.nbytes += sum(tensor.nbytes for tensor in weights)
            self._make_room()
        return compiled

    def _is_right(
        self,
        compiled: CompiledVariant,
        call: Call,
        caches: Mapping[tuple[Kind, str], torch.Tensor],
        forward: Callable[..., Any],
    ) -> bool:
        """Whether a graph with free sizes stands for what the denoiser does with those of `call`.

        Its code may do something else from a certain length on, and for which lengths a graph is valid is known to
        torch.export only in part.
        """
        args, kwargs = call.arguments
        expected = pytree.tree_leaves(forward(*args, **kwargs))
        inputs = _inputs(compiled.variant, compiled.captured, call, caches)
        results = compiled.variant.program.graph_module.forward(*compiled.weights, *inputs)
        return all(_close(result, value) for result, value in zip(results, expected, strict=False))  # caches follow

    def _without_free_sizes(
        self,
        address: _Address,
        phase: Phase,
        call: Call,
        caches: Mapping[tuple[Kind, str], torch.Tensor],
        forward: Callable[..., Any],
    ) -> CompiledVariant:
        """A graph for the sizes of `call` alone: one with free sizes is not right for it, or cannot be compiled."""
        own = _Address(self._model, call.key)
        logger.info("a graph with free sizes does not serve this call of %s", type(self.denoiser).__name__)
        if address == own:
            self._drop(own)
        else:
            self._found = {key: at for key, at in self._found.items() if key[0] != own}
        with exclusive():
            held = self._captures[own] = self._held(self._capture(call, forward), {})
            self._variants[own, phase] = self._specialize(held.captured, phase)
        held.checked.add(call.key)
        self._found[own, phase] = own
        return self._compile(own, phase, call, caches)

    def _make_room(self) -> None:
        """Drop the graphs that were used least recently, but none that this generation has used."""
        limit = self._config.graph_memory or int(SHARE_OF_MEMORY * _physical_memory())
        taken = sum(held.nbytes for held in self._captures.values())
        for address, held in list(self._captures.items()):
            if taken <= limit:
                return
            if held.last_used < self._generations:
                taken -= held.nbytes
                self._drop(address)
                self._say_full(limit)

    def _drop(self, address: _Address) -> None:
        del self._captures[address]
        for made in (self._variants, self._compiled):
            for key in [key for key in made if key[0] == address]:
                del made[key]
        self._found = {key: at for key, at in self._found.items() if at != address}

    def _say_full(self, limit: int) -> None:
        if not self._said_full:
            self._said_full = True
            logger.warning(
                "The graphs of %s take more than %.1f GB (%d compiled so far), so the least recently used are dropped, "
                "and made again when they are needed. optimize(..., graph_memory=<bytes>) raises the limit.",
                type(self.denoiser).__name__, limit / 1e9, self.compilations,
            )  # fmt: skip


def _weights(variant: Variant, live: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    constants = variant.program.constants
    return [live[name] if name in live else constants[name] for name in variant.weights]


def _inputs(
    variant: Variant, captured: Captured, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor]
) -> list[torch.Tensor]:
    by_name = dict(zip(captured.input_names, call.leaves, strict=True))
    reused = [caches[site.kind, site.name] for site in variant.reused]
    return [*(by_name[name] for name in variant.inputs), *reused]


def _is_same(live: torch.Tensor | None, held: torch.Tensor) -> bool:
    """Whether a program's tensor is the denoiser's present one, or has the same memory (that of a quantized weight)."""
    return live is held or (live is not None and live.shape == held.shape and live.data_ptr() == held.data_ptr())


def _latents_of(call: Call, forward: Callable[..., Any]) -> int:
    """The position of the latents among the leaves of `call`."""
    args, kwargs = call.arguments
    latents = latents_of(inspect.signature(forward).bind(*args, **kwargs).arguments)
    return next(position for position, leaf in enumerate(call.leaves) if leaf is latents)


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    eps = torch.finfo(result.dtype).eps
    tolerance = eps * (64 if eps < 1e-5 else 8)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((result - expected).abs() <= tolerance * scale).all())


def _physical_memory() -> int:
    """Of this machine, in bytes; 16 GB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 * 10**9
