"""The compiled variants of one denoiser, captured and compiled when they are first needed."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram, ShapesCollection

from tgate_compile._errors import BackendError, CaptureError
from tgate_compile._machine import physical_memory
from tgate_compile.engine.call import Call, FreeDims, differing_dims, fits
from tgate_compile.engine.capture import capture, deep_layer
from tgate_compile.engine.choice import Chooser
from tgate_compile.engine.compiled import (
    CachedValues,
    CompiledVariant,
    EarlyValues,
    compile_variant,
    inputs_for,
    tensors_of,
)
from tgate_compile.engine.config import Config
from tgate_compile.engine.disk import kept_capture
from tgate_compile.engine.halves import check_halves_of_text, latents_of
from tgate_compile.engine.purity import check_python, check_stateless
from tgate_compile.engine.traffic import exclusive
from tgate_compile.engine.trust import ChosenBackend, Reference, Served, agree
from tgate_compile.engine.weights import Watch, check_quantization, check_weights_stay, is_same, live_tensors
from tgate_compile.methods.method import Phase
from tgate_compile.passes.binding_times import split_by_binding
from tgate_compile.passes.graphs import Captured, Emission, Variant
from tgate_compile.passes.specialize import specialize

logger = logging.getLogger(__name__)

#: Estimate of a graph's memory per node, in bytes: torch.fx's nodes with their metadata, and the backend's compiled
#: form of them, without weights. It is the growth of a process's resident memory per node of captures and variants
#: together, as a UNet like Stable Diffusion's was captured at further sizes: 4 kB in eager mode (7,400 nodes for each
#: size), 14 kB with Inductor, 15 kB with ONNX Runtime (2,200 nodes; its copies of weights are counted separately).
BYTES_PER_NODE = 15_000
#: The fraction of the machine's memory that all graphs of a denoiser may take, unless `graph_memory` is set.
SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class _Address:
    """The key of a capture: the number of the denoiser's state, and the key of the call that was captured."""

    model: int
    key: Hashable


@dataclass
class _Held:
    """A capture and its bookkeeping.

    Attributes:
        captured: the graph.
        free: the free dimensions, by the position of the tensor among the call's leaves.
        last_used: the number of the generation that used it last.
        nbytes: the estimated memory of the capture and its variants, in bytes.
        checked: the keys of calls with other sizes for which its results agreed with the denoiser's.
        compared: the phases and keys of calls with other sizes for which its compiled variants were correct.
        alone: whether it serves only the call that it was captured from.
    """

    captured: Captured
    free: FreeDims
    last_used: int
    nbytes: int
    checked: set[Hashable] = field(default_factory=set)
    compared: set[Hashable] = field(default_factory=set)
    alone: bool = False

    def used(self, variant: Variant) -> set[int]:
        """Return the positions of the call's leaves that `variant` takes; the other leaves may have any size."""
        return {position for position, name in enumerate(self.captured.input_names) if name in variant.inputs}


class VariantStore:
    """The captures and compiled variants of `denoiser` by state, phase and shapes of the inputs.

    A new shape, dtype, device or constant argument leads to a new capture, which is logged; so does a change of the
    denoiser (see `fingerprint`). Graphs of earlier states and shapes are kept as long as there is room for them.

    A size that does not concern the latents (the length of the text) is left free once a second value of it has
    occurred. It does not matter for graphs that do not take the inputs that have this size.
    """

    def __init__(self, denoiser: torch.nn.Module, config: Config) -> None:
        self.denoiser = denoiser
        self._config = config
        self._watch: Watch | None = None  # of the state `_model`
        self._models: dict[Hashable, int] = {}  # numbers of the denoiser's states, by fingerprint
        self._model = -1
        self._next_model = 0
        self._stateless: set[int] = set()
        self._captures: OrderedDict[_Address, _Held] = OrderedDict()
        self._variants: dict[tuple[_Address, Phase], Variant] = {}
        self._compiled: dict[tuple[_Address, Phase], CompiledVariant] = {}
        self._found: dict[tuple[_Address, Phase], _Address] = {}  # the captures that serve calls, one for all parts
        self._backends: dict[tuple[int, torch.device], ChosenBackend] = {}  # a state may need another backend
        self._chooser = Chooser(config, type(denoiser).__name__)
        self._failed: dict[_Address, str] = {}  # calls that cannot be captured, with the reason
        self.image_rows: dict[Hashable, tuple[int, int, int] | None] = {}  # `ReferenceRows`
        self._not_free: set[Hashable] = set()  # sizes that the denoiser's code fixes, by state
        self._generations = 0
        self._warned_full = False
        self.compilations = 0

    @staticmethod
    def key_of(config: Config) -> Hashable:
        """Return the part of a configuration that the graphs depend on. Pipelines with equal keys can share a store."""
        schedule = config.schedule
        return (
            schedule.sought,
            schedule.deepcache_branch,
            schedule.anchor_weight,
            config.family.order,
            config.sites,
            config.cache_dtype,
            config.precision,
            config.backend,
            repr(sorted(config.backend_options.items())),
            config.graph_memory,
            config.binding_times,
            config.offload_prelude,
        )

    folder = None  # the graphs are captured in this process

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of the sites that can be cached, in the capture that has the most."""
        found = max((held.captured.sites for held in self._captures.values()), key=len, default=())
        return tuple(site.name for site in found)

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """The variants of the denoiser's present state, compiled or not, each with the capture it was derived from."""
        return [
            (variant, self._captures[address].captured)
            for (address, _), variant in self._variants.items()
            if address.model == self._model
        ]

    @property
    def compiled(self) -> list[CompiledVariant]:
        """The compiled variants of all states."""
        return list(self._compiled.values())

    def refresh(self, *, begins: bool = True) -> None:
        """Check the denoiser for changes, and fetch its present parameters; `begins` starts a new generation."""
        self._generations += begins
        watch = self._watch or Watch(self.denoiser)
        if watch is self._watch and watch.refresh():
            self._renew(self._model, None)
            return
        self._watch = None  # until all checks have passed
        current = watch.fingerprint
        model = self._models.get(current)
        if model is None:
            check_weights_stay(self.denoiser)
            check_quantization(self.denoiser)
            check_python(self.denoiser)
            model = self._models[current] = self._next_model
            self._next_model += 1
            if self._captures:
                logger.info("%s has changed: capturing it again", type(self.denoiser).__name__)
        self._release_old_tensors(model, watch.live)
        self._renew(model, watch.live)
        self._model, self._watch = model, watch

    def _renew(self, model: int, live: Mapping[str, torch.Tensor] | None) -> None:
        """Give each runner a new list of weights, from `live`, or of the same ones: values may have changed."""
        for key, compiled in list(self._compiled.items()):
            if key[0].model != model:
                renewed = compiled.without_weights()  # the tensors may have been replaced
            else:
                renewed = compiled.with_weights(live)
                if isinstance(renewed.runner, Served):
                    renewed.runner.prepare(renewed.step_weights)
            self._compiled[key] = renewed

    def _release_old_tensors(self, model: int, live: Mapping[str, torch.Tensor]) -> None:
        """Release parameters that the denoiser has replaced from the graphs that hold them.

        Graphs of the present state `model` get the new parameters. Graphs of other states hold none until their state
        returns, for example when a LoRA is loaded again.
        """
        for address, held in self._captures.items():
            variants = {key: variant for key, variant in self._variants.items() if key[0] == address}
            parts = [part for key in variants if key in self._compiled for part in self._compiled[key].parts]
            old = [
                (tensors, name)
                for program in (held.captured.program, *(part.program for part in (*variants.values(), *parts)))
                for tensors, name in _held_tensors(program)
                if not is_same(live.get(name), tensors[name])
            ]
            for tensors, name in old:
                tensors[name] = live[name] if address.model == model else _without_data(tensors[name])
            for key in variants if old else ():
                runner = self._compiled[key].runner if key in self._compiled else None
                if isinstance(runner, Served):
                    runner.release()

    def variant(
        self, phase: Phase, call: Call, forward: Callable[..., Any], caches: CachedValues | None = None
    ) -> tuple[Variant, Captured]:
        """Return a variant of `phase` for inputs like those of `call`, uncompiled, and the capture behind it.

        Without `caches` the variant is not checked for inputs that it does not take, so that it may have been captured
        with a text of another length.
        """
        own = _Address(self._model, call.key)
        address = self._found.get((own, phase)) or next(self._right(own, phase, call, caches, forward))
        return self._variant(address, phase), self._captures[address].captured

    def _variant(self, address: _Address, phase: Phase) -> Variant:
        held = self._captures[address]
        held.last_used = self._generations
        self._captures.move_to_end(address)
        variant = self._variants.get((address, phase))
        if variant is None:
            with exclusive():
                variant = self._variants[address, phase] = self._specialize(held.captured, phase)
            held.nbytes += BYTES_PER_NODE * len(variant.program.graph.nodes)
        return variant

    def _right(
        self, own: _Address, phase: Phase, call: Call, caches: CachedValues | None, forward: Callable[..., Any]
    ) -> Iterator[_Address]:
        """Yield captures that serve `phase` for `call`, the best first; missing ones are captured.

        A capture of another call, or with free sizes, is first compared with the denoiser: the denoiser's code may
        behave differently from a certain length on, and torch.export does not know all the conditions under which a
        graph is valid. The last capture, with exactly the sizes of `call`, needs no comparison.
        """
        reference = Reference(self.denoiser, forward, call)
        for address in self._possible(own, phase, call, forward):
            held = self._captures[address]
            if (
                (address == own and not held.free)
                or call.key in held.checked
                or self._is_right(address, phase, call, caches, reference)
            ):
                yield address
            else:
                held.alone = held.alone or not held.free
                logger.info("a graph of %s does not serve this call's sizes", type(self.denoiser).__name__)

    @torch.no_grad()
    def _is_right(
        self, address: _Address, phase: Phase, call: Call, caches: CachedValues | None, reference: Reference
    ) -> bool:
        """Return whether the capture at `address` computes what the denoiser does with the sizes of `call`."""
        held, live = self._captures[address], live_tensors(self.denoiser)
        captured = held.captured
        if fits(call.key, address.key, held.free):
            weights = tensors_of(captured.program, live)
            right = agree(captured.program.graph_module.forward(*weights, *call.leaves), reference.outputs)
            if right:
                held.checked.add(call.key)
            return right
        # The variant does not take the inputs whose sizes differ.
        if caches is None or phase.part != "whole":
            return caches is None  # then nothing will be computed
        expected = reference.outputs_with([site for site in captured.sites if site.kind in phase.reuse], caches)
        if expected is None:
            return False
        variant = self._variants[address, phase]
        inputs = inputs_for(variant, captured, call, caches)
        results = variant.program.graph_module.forward(*tensors_of(variant.program, live), *inputs)
        return agree(results[: len(expected)], expected)

    def _possible(self, own: _Address, phase: Phase, call: Call, forward: Callable[..., Any]) -> Iterator[_Address]:
        """Yield captures that may serve `phase` for `call`, and finally a new one that certainly does."""
        if own in self._captures:
            yield own
        mine = [(address, held) for address, held in self._captures.items() if address.model == self._model]
        others = [(address, held) for address, held in mine if address != own and not held.alone]
        fitting = [address for address, held in others if fits(call.key, address.key, held.free)]
        for address, held in others:
            variant = self._variants.get((address, phase))
            if address in fitting or (
                variant is not None and fits(call.key, address.key, held.free, held.used(variant))
            ):
                yield address
        # As in torch.compile, a size is assumed to be fixed until it has had a second value.
        free = next((dims for address, _ in mine if (dims := differing_dims(call.key, address.key))), {})
        if free and not fitting and own not in self._captures:
            made = self._free_capture(call, forward, free)
            if made is not None:
                yield self._keep(own, made)
        with exclusive():
            if own in self._failed:
                raise CaptureError(self._failed[own])
            self._check_stateless(call, forward)
            try:
                made = self._held(self._capture(call, forward), {})
            except CaptureError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    self._failed[own] = str(error)
                raise
        if own in self._captures:
            self._drop(own)  # a capture with free sizes that gives wrong results, or cannot be compiled
        yield self._keep(own, made)

    def _keep(self, address: _Address, made: _Held) -> _Address:
        self._captures[address] = made
        self._make_room()
        return address

    def _free_capture(self, call: Call, forward: Callable[..., Any], free: FreeDims) -> _Held | None:
        """Capture the denoiser with the sizes `free` left free; return None if its code does not permit it."""
        tried = self._model, tuple(free.items())
        if _latents_of(call, forward) in free or tried in self._not_free or self._config.schedule.rule is not None:
            return None  # with a rule, a backend must not choose another capture for a part of a step
        copy = call.map_tensors(torch.Tensor.clone)  # ShapesCollection identifies tensors by id
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]
        for position, dims in free.items():
            shapes[copy.leaves[position]] = dict.fromkeys(dims, torch.export.Dim.AUTO)
        try:
            captured = self._capture(copy, forward, shapes)
        except CaptureError as error:
            logger.debug("%s cannot leave sizes free: %s", type(self.denoiser).__name__, error)
            self._not_free.add(tried)
            return None
        inputs = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.op == "placeholder"}
        still_free = {
            position: tuple(
                dim for dim in dims if isinstance(inputs[captured.input_names[position]].shape[dim], torch.SymInt)
            )
            for position, dims in free.items()
        }
        if not all(still_free.values()):
            self._not_free.add(tried)
            return None
        return self._held(captured, still_free)

    def _held(self, captured: Captured, free: FreeDims) -> _Held:
        return _Held(captured, free, self._generations, BYTES_PER_NODE * len(captured.program.graph.nodes))

    def _check_stateless(self, call: Call, forward: Callable[..., Any]) -> None:
        """Check that the denoiser is stateless, before its first capture in this state."""
        if self._model in self._stateless:
            return

        def run() -> None:
            args, kwargs = call.map_tensors(torch.Tensor.clone).arguments  # to detect inputs that are kept
            with torch.no_grad(), torch.random.fork_rng():
                forward(*args, **kwargs)

        check_stateless(self.denoiser, run)
        self._stateless.add(self._model)

    @exclusive()
    def free_variants(
        self, phases: Sequence[Phase], call: Call, forward: Callable[..., Any], shapes: ShapesCollection | None
    ) -> tuple[list[Variant], Captured]:
        """Return the variants of `phases` for inputs like those of `call` with the free sizes `shapes`, uncached.

        Raises:
            CaptureError: the denoiser's code depends on these sizes.
        """
        captured = self._capture(call, forward, shapes)
        return [self._specialize(captured, phase) for phase in phases], captured

    def _capture(self, call: Call, forward: Callable[..., Any], shapes: ShapesCollection | None = None) -> Captured:
        schedule = self._config.schedule
        layer = deep_layer(self.denoiser, schedule.deepcache_branch) if "deep" in schedule.kinds else None
        only, dtype = self._config.sites, self._config.cached_in
        sought = {name: value for name, value in schedule.sought._asdict().items() if name != "kinds"}
        make = partial(capture, self.denoiser, forward, call, schedule.kinds, layer, **sought)
        make = partial(make, only=only, cache_dtype=dtype, shapes=shapes)
        if shapes is not None or self._watch is None:
            return make()
        strides = tuple(leaf.stride() for leaf in call.leaves if torch.is_tensor(leaf))
        given = self._watch.fingerprint, call.key, strides, schedule.sought, layer, only, dtype
        return kept_capture(self.denoiser, given, make)

    def _specialize(self, captured: Captured, phase: Phase) -> Variant:
        cond_weight = self._config.schedule.anchor_weight
        if phase.merge:
            check_halves_of_text(captured, cond_weight, self._config.schedule.kept)
        cond_is_second = self._config.family.order[1] == "cond"
        return specialize(captured, phase, cond_weight if cond_is_second else 1.0 - cond_weight)

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return what the variant of `phase` emits for inputs like those of `call`, captured but not compiled."""
        return self.variant(phase, call, forward)[0].emitted

    def get(self, phase: Phase, call: Call, caches: CachedValues, forward: Callable[..., Any]) -> CompiledVariant:
        """Return the compiled variant of `phase` for `call`; `forward` is the denoiser's original one."""
        own = _Address(self._model, call.key)
        found = self._found.get((own, phase)) or self._found.get((own, phase.of_part("head")))
        for address in self._right(own, phase, call, caches, forward) if found is None else (found,):
            compiled = self._ready(address, phase, call, caches)
            if compiled is not None:
                self._found[own, phase] = address
                return compiled
        raise AssertionError("a capture of a call does not serve it")

    def _ready(self, address: _Address, phase: Phase, call: Call, caches: CachedValues) -> CompiledVariant | None:
        """Return the compiled variant of the capture at `address`; None if the backend fails with its free sizes."""
        variant, held = self._variant(address, phase), self._captures[address]
        try:
            compiled = self._compiled.get((address, phase)) or self._compile(address, phase, call, caches)
            if held.free and (phase, call.key) not in held.compared and _has_free_inputs(variant):
                assert isinstance(compiled.runner, Served)
                compiled.runner.compare(compiled.step_weights, compiled.inputs(call, caches, EarlyValues()))
                held.compared.add((phase, call.key))
        except BackendError as error:
            if not held.free:
                raise
            logger.info("%s", error)
            return None
        return compiled

    def _compile(self, address: _Address, phase: Phase, call: Call, caches: CachedValues) -> CompiledVariant:
        variant, held = self._variants[address, phase], self._captures[address]
        device = call.leaves[held.captured.input_names.index(held.captured.latents)].device
        if (self._model, device) not in self._backends:
            self._backends[self._model, device] = self._chooser.backend(device, self._generations)
        backend, split = self._backends[self._model, device], None
        if self._config.splits(backend.name, constant_text=held.captured.constant):
            with exclusive():
                split = split_by_binding(variant, held.captured.roles)
            held.nbytes += BYTES_PER_NODE * sum(len(part.program.graph.nodes) for part in split.parts)
        compiled = compile_variant(variant, held.captured, split, backend, live_tensors(self.denoiser), call, caches)
        self._compiled[address, phase] = compiled
        self.compilations += 1
        if backend.packs_weights:
            held.nbytes += sum(tensor.nbytes for tensor in compiled.step_weights)
        self._make_room()
        return compiled

    def _make_room(self) -> None:
        """Drop the least recently used graphs, except for those used by the present generation."""
        limit = self._config.graph_memory or int(SHARE_OF_MEMORY * physical_memory())
        taken = sum(held.nbytes for held in self._captures.values())
        for address, held in list(self._captures.items()):
            if taken <= limit:
                return
            if held.last_used < self._generations:
                taken -= held.nbytes
                self._drop(address)
                self._warn_full(limit)

    def _drop(self, address: _Address) -> None:
        del self._captures[address]
        for made in (self._variants, self._compiled):
            for key in [key for key in made if key[0] == address]:
                del made[key]
        self._found = {key: at for key, at in self._found.items() if at != address}
        model = address.model
        if model != self._model and all(other.model != model for other in self._captures):
            self._models = {state: number for state, number in self._models.items() if number != model}
            self._backends = {key: backend for key, backend in self._backends.items() if key[0] != model}

    def _warn_full(self, limit: int) -> None:
        if not self._warned_full:
            self._warned_full = True
            logger.warning(
                "The graphs of %s take more than %.1f GB (%d compiled so far), so the least recently used are dropped "
                "and recompiled when they are needed. optimize(..., graph_memory=<bytes>) raises the limit.",
                type(self.denoiser).__name__, limit / 1e9, self.compilations,
            )  # fmt: skip


def _has_free_inputs(variant: Variant) -> bool:
    inputs = [node.meta["val"] for node in variant.program.graph.nodes if node.op == "placeholder"]
    return any(isinstance(size, torch.SymInt) for each in inputs if torch.is_tensor(each) for size in each.shape)


def _held_tensors(program: ExportedProgram) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the places where `program` holds the denoiser's tensors: a dictionary, and the tensor's name in it."""
    for name in program.state_dict:
        yield program.state_dict, name
    for name in program.graph_signature.non_persistent_buffers:
        if name in program.constants:
            yield program.constants, name


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _latents_of(call: Call, forward: Callable[..., Any]) -> int:
    """Return the position of the latents among the leaves of `call`."""
    args, kwargs = call.opened_arguments
    latents = latents_of(inspect.signature(forward).bind(*args, **kwargs).arguments)
    return next(position for position, leaf in enumerate(call.leaves) if leaf is latents)
