"""Serve a denoiser from the graphs of a bundle, instead of from graphs that are captured and compiled here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._errors import BundleError
from tgate_compile.bundle.denoiser_state import state_of_denoiser, what_differs
from tgate_compile.bundle.formats import GraphFormat, Refittable, Session
from tgate_compile.bundle.manifest import CacheOutput, Graph, TensorSpec, phase_of, return_freed_memory
from tgate_compile.bundle.plan import argument_names, unflatten_as
from tgate_compile.bundle.read import Bundle
from tgate_compile.bundle.read_manifest import shape_at, sizes_for, wrong_pixels
from tgate_compile.bundle.weights import bit_sums, dtype_name
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import EarlyValues
from tgate_compile.engine.weights import Watch, live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Captured, Emission, Site, Variant

MSG_CHANGED = (
    "The weights or modules of the denoiser have changed since the bundle {folder} was loaded, but the bundle has the "
    "old ones{what}. Call tgate_compile.restore(pipe), then optimize(pipe, ...) for the changed model."
)


@dataclass(frozen=True)
class BundledGraph:
    """A graph of a bundle, ready to run."""

    graph: Graph
    names: tuple[str, ...]
    session: Session
    emitted: tuple[Emission, ...]
    put: Callable[[Sequence[torch.Tensor]], Any]

    def run(
        self, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`; `early` is not used."""
        by_name = dict(zip(self.names, call.leaves, strict=True))
        inputs = [_as(spec, by_name[spec.name]) for spec in self.graph.inputs]
        reused = [caches[spec.kind, spec.site] for spec in self.graph.cache_inputs]
        outputs = self.session.run([*inputs, *reused])
        count = len(self.graph.outputs)
        return outputs[:count], outputs[count:]

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Pack the flat outputs into the type that the denoiser returns."""
        return self.put(outputs)


class BundleStore:
    """The graphs of `bundle` for `denoiser`, each opened by `functions` when it is first needed.

    Open graphs stay open. With `sequential`, a graph is closed when another one is needed.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        bundle: Bundle,
        functions: GraphFormat,
        anchor: float,
        options: Mapping[str, object],
        *,
        sequential: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self._sequential = sequential
        self._bundle = bundle
        self._anchor = anchor
        self._options = options
        self._graphs = {phase_of(graph.phase): (name, graph) for name, graph in bundle.manifest.graphs.items()}
        self._sessions: dict[tuple[Phase, torch.device], Session] = {}
        self._opened: dict[tuple[Hashable, Phase], BundledGraph] = {}
        manifest = bundle.manifest
        self._functions = functions
        self._put = unflatten_as(manifest.denoiser.returns, denoiser, manifest.pipeline.diffusers)
        self._watch = Watch(denoiser)
        self._modules = self._watch.fingerprint
        self._state = state_of_denoiser(denoiser, baseline="none")
        self._loaded = self._weights = bit_sums(denoiser)

    @property
    def folder(self) -> str:
        """The folder of the bundle."""
        return str(self._bundle.folder)

    @property
    def open_graphs(self) -> tuple[str, ...]:
        """The names of the graphs that are currently open."""
        return tuple(self._graphs[phase][0] for phase, _ in self._sessions)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names of all modules whose outputs are cached."""
        graphs = self._bundle.manifest.graphs.values()
        return tuple(dict.fromkeys(output.site for graph in graphs for output in graph.cache_outputs))

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        """An empty list: a bundle's graphs are not derived here."""
        return []

    def refresh(self, *, begins: bool = True) -> None:
        """Check that the denoiser has not changed since the bundle was loaded; if its weights have, refit the graphs.

        Raises:
            BundleError: the denoiser has changed, and the graphs cannot be refitted.
            BackendError: the runtime cannot refit a graph.
        """
        weights = bit_sums(self.denoiser)
        self._watch.refresh()
        if self._watch.fingerprint != self._modules:
            changed = what_differs(state_of_denoiser(self.denoiser, baseline="none"), self._state, there="then")
            what = f" ({'; '.join(changed)})" if changed else ""
            raise BundleError(MSG_CHANGED.format(folder=self._bundle.folder, what=what))
        if weights != self._weights:
            for session in self._sessions.values():
                self._refit(session)
            self._weights = weights

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return the values that the graph of `phase` emits for `call`, which the bundle must support."""
        graph = self._graph(phase)
        sizes = self._sizes(graph, call, argument_names(call, forward))
        return tuple(_emission(output, sizes, self._anchor) for output in graph.cache_outputs)

    def get(
        self, phase: Phase, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], forward: Callable[..., Any]
    ) -> BundledGraph:
        """Return the graph of `phase`, after opening it if necessary.

        Raises:
            BundleError: the bundle lacks the graph, or the graph does not support the shapes or arguments of `call`.
            BackendError: the runtime cannot open it.
        """
        key = (call.key, phase)
        if key not in self._opened:
            emitted = self.emitted(phase, call, forward)
            graph = self._graph(phase)
            device = next(leaf.device for leaf in call.leaves if torch.is_tensor(leaf))
            session = self._session(phase, device)
            self._opened[key] = BundledGraph(graph, argument_names(call, forward), session, emitted, self._put)
        return self._opened[key]

    def _session(self, phase: Phase, device: torch.device) -> Session:
        key = (phase, device)
        if key not in self._sessions:
            if self._sequential:
                self._opened.clear()
                self._sessions.clear()
                return_freed_memory()
            session = self._functions.open_graph(self._graph(phase), self._bundle.folder, device, self._options)
            if self._weights != self._loaded:
                self._refit(session)
            self._sessions[key] = session
        return self._sessions[key]

    def _refit(self, session: Session) -> None:
        if not isinstance(session, Refittable):
            raise BundleError(MSG_CHANGED.format(folder=self._bundle.folder, what=""))
        session.refit(live_tensors(self.denoiser))

    def _graph(self, phase: Phase) -> Graph:
        if phase not in self._graphs:
            needed = f"{phase.name}, {'with' if phase.guided else 'without'} guidance"
            graphs = ", ".join(name for name, _ in self._graphs.values())
            raise BundleError(
                f"The bundle {self._bundle.folder} has no graph for a step of this call ({needed}). It has {graphs}. "
                "Export a bundle with a call like this one."
            )
        return self._graphs[phase][1]

    def _sizes(self, graph: Graph, call: Call, names: Sequence[str]) -> Mapping[str, int]:
        """Check `call` against `graph`, and return its free sizes."""
        manifest = self._bundle.manifest.denoiser
        given = dict(zip(names, call.leaves, strict=True))
        tensors = [name for name, value in given.items() if torch.is_tensor(value)]
        constants = {name: value for name, value in given.items() if not torch.is_tensor(value)}
        if set(tensors) != set(manifest.arguments) or _exactly(constants) != _exactly(manifest.constants):
            raise BundleError(
                f"The bundle {self._bundle.folder} needs the denoiser to be called with "
                f"{_arguments(manifest.arguments, manifest.constants)}, but this call has "
                f"{_arguments(tensors, constants)}. Export a bundle with a call like this one."
            )
        inputs = [_as(spec, given[spec.name]) for spec in graph.inputs]
        sizes = sizes_for(graph, inputs)
        right_dtypes = all(dtype_name(t.dtype) == spec.dtype for t, spec in zip(inputs, graph.inputs, strict=True))
        if sizes is not None and right_dtypes and self._within(sizes):
            return sizes
        self._check_pixels(graph, inputs)
        expected = [_shown(spec) for spec in graph.inputs]
        found = [_shown_tensor(spec.name, tensor) for spec, tensor in zip(graph.inputs, inputs, strict=True)]
        pairs = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        supported, got = (", ".join(texts) for texts in zip(*pairs, strict=True))
        free = self._bundle.manifest.sizes.items()
        if free:
            supported += " with " + ", ".join(f"{name} from {size.least} to {size.most}" for name, size in free)
        raise BundleError(
            f"The bundle {self._bundle.folder} supports {supported}, but this call has {got}. Call the pipeline with "
            "an image size, a number of images and a prompt length that the bundle supports, or export a bundle for "
            "these."
        )

    def _check_pixels(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        """Raise BundleError, with sizes in pixels, if the graph does not support the images' height or width."""
        manifest = self._bundle.manifest
        limits = {name: (size.least, size.most) for name, size in manifest.sizes.items()}
        for spec, tensor in zip(graph.inputs, inputs, strict=True):
            if spec.name == manifest.denoiser.latents:
                wrong = wrong_pixels(spec.shape, tensor.shape, manifest.pipeline.vae_scale_factor, limits)
                if wrong:
                    raise BundleError(
                        f"For the bundle {self._bundle.folder}, {wrong}. Call the pipeline with such a size, or export "
                        "a bundle for this one."
                    )

    def _within(self, sizes: Mapping[str, int]) -> bool:
        free = self._bundle.manifest.sizes
        return all(free[name].least <= value <= free[name].most for name, value in sizes.items())


def _emission(output: CacheOutput, sizes: Mapping[str, int], anchor: float) -> Emission:
    dtype = getattr(torch, output.dtype)
    batch, *rest = shape_at(output.shape, sizes)
    shape = (2 * batch if output.merged else batch, *rest)
    site = Site(output.kind, output.site, output.name, shape, dtype, dtype)
    return Emission(site, anchor if output.merged else None)


def _as(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, converted to float32 if it is an integer timestep and the graph expects fractional ones."""
    is_integer_timestep = not tensor.is_floating_point() and spec.dtype == "float32"
    return tensor.float() if is_integer_timestep else tensor


def _exactly(constants: Mapping[str, object]) -> dict[str, tuple[type, object]]:
    """Return the constants with their types: True == 1 == 1.0, but the graphs captured for them differ."""
    return {name: (type(value), value) for name, value in constants.items()}


def _arguments(tensors: Sequence[str], constants: Mapping[str, object]) -> str:
    return ", ".join([*sorted(tensors), *(f"{name}={value!r}" for name, value in sorted(constants.items()))])


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _shown_tensor(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {dtype_name(tensor.dtype)}{list(tensor.shape)}"
