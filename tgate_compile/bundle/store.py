"""Serve a denoiser from the graphs of a bundle, instead of from graphs that are captured and compiled here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._errors import BundleError
from tgate_compile._machine import return_freed_memory
from tgate_compile.bundle.denoiser_state import state_of_denoiser, what_differs
from tgate_compile.bundle.formats import GraphFormat, Refittable, Session
from tgate_compile.bundle.manifest import CacheOutput, Graph, TensorSpec, phase_of
from tgate_compile.bundle.plan import argument_names, unflatten_as
from tgate_compile.bundle.read import Bundle
from tgate_compile.bundle.read_manifest import early_graphs, shape_at, solve, wrong_pixels
from tgate_compile.bundle.weights import bit_sums, dtype_name
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import EarlyValues
from tgate_compile.engine.samples import WeightSamples
from tgate_compile.engine.weights import Watch, live_tensors, plain_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Binding, Captured, Emission, Site, Variant
from tgate_compile.pipeline.two_halves import Rows

MSG_CHANGED = (
    "The weights or modules of the denoiser have changed since the bundle {folder} was loaded, but the bundle has the "
    "old ones{what}. Call tgate_compile.restore(pipe), then optimize(pipe, ...) for the changed model."
)


MSG_OTHER_REFERENCES = (
    "The bundle {folder} was made for calls {rows}, but this call has other reference images, or none. Call the "
    "pipeline with a reference image of the size that the bundle was exported with, or export a bundle for this one."
)


@dataclass(frozen=True)
class BundledPart:
    """A prelude or a table of a bundle.

    Attributes:
        name: its name in the bundle.
        inputs: the names of its inputs, in order.
        outputs: the names of its outputs, in order.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class BundledParts:
    """The parts that run before the step of a graph of a bundle, if they exist."""

    prelude: BundledPart | None
    table: BundledPart | None

    @property
    def early(self) -> tuple[BundledPart, ...]:
        """The prelude and the table, if they exist."""
        return tuple(part for part in (self.prelude, self.table) if part is not None)


@dataclass(frozen=True)
class BundledGraph:
    """A graph of a bundle, ready to run.

    Attributes:
        name: its name in the bundle.
        graph: its description.
        split: the parts that run before it; None if there are none.
        roles: how often each argument of the denoiser changes.
        ahead: whether to compute the rows of all timesteps at once, because only one graph is open at a time.
        names: the names of the leaves of a call.
        session: returns the session of a graph of the bundle, after opening it if necessary.
        emitted: the sites whose values it returns for later steps, in order.
        put: packs flat outputs into the type that the denoiser returns.
    """

    name: str
    graph: Graph
    split: BundledParts | None
    roles: Mapping[str, Binding]
    ahead: bool
    names: tuple[str, ...]
    session: Callable[[str], Session]
    emitted: tuple[Emission, ...]
    put: Callable[[Sequence[torch.Tensor]], Any]

    @property
    def early_weights(self) -> tuple[Sequence[torch.Tensor], ...]:
        """Nothing for each part: the sessions have the weights."""
        return () if self.split is None else ((),) * len(self.split.early)

    @property
    def step_weights(self) -> Sequence[torch.Tensor]:
        """Nothing: the session has the weights."""
        return ()

    def run(
        self, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], early: EarlyValues
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the denoiser's flat outputs for `call`, and the values of `emitted`; `early` keeps other values."""
        given = zip(self.names, call.leaves, strict=True)
        by_name = {name: _float_time(leaf) if self.roles.get(name) == "timestep" else leaf for name, leaf in given}
        values = {} if self.split is None else early.of(self, by_name)
        inputs = [_as(spec, by_name[spec.name]) for spec in self.graph.inputs]
        made = [values[spec.name] for spec in self.graph.early_inputs]
        reused = [caches[spec.kind, spec.site] for spec in self.graph.cache_inputs]
        outputs = self.session(self.name).run([*inputs, *made, *reused])
        count = len(self.graph.outputs)
        return outputs[:count], outputs[count:]

    def run_early(self, position: int, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the values of the part at `position` in `split.early`."""
        assert self.split is not None
        return self.session(self.split.early[position].name).run(inputs)

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """Pack the flat outputs into the type that the denoiser returns."""
        return self.put(outputs)


class _FixedRows(dict[Hashable, Rows]):
    """The rows of the image in a bundle's graphs, for every call, in place of what `ReferenceRows` learns."""

    def __init__(self, rows: Rows, folder: str) -> None:
        super().__init__()
        self._rows = rows
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Hashable) -> Rows:
        return self._rows

    def get(self, key: Hashable, default: Any = None) -> Rows:
        """Return the rows."""
        return self._rows

    def update(self, found: Mapping[Hashable, Rows]) -> None:  # type: ignore[override]
        """Raise BundleError if the rows `found` in a call are others."""
        if any(rows != self._rows for rows in found.values()):
            raise BundleError(MSG_OTHER_REFERENCES.format(folder=self._folder, rows=_in_words(self._rows)))


def _in_words(rows: Rows) -> str:
    return "without a reference image" if rows is None else f"whose image has the tokens {rows[1]} to {rows[2] - 1}"


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
        steps = [(name, graph) for name, graph in bundle.manifest.graphs.items() if graph.stage == "step"]
        self._graphs = {phase_of(graph.phase): (name, graph) for name, graph in steps}
        self._sessions: dict[tuple[str, torch.device], Session] = {}
        self._opened: dict[tuple[Hashable, Phase], BundledGraph] = {}
        manifest = bundle.manifest
        self._functions = functions
        rows = manifest.denoiser.image_rows
        self.image_rows: dict[Hashable, Rows] = _FixedRows(
            None if rows is None else (rows[0], rows[1], rows[2]), self.folder
        )
        self._put = unflatten_as(manifest.denoiser.returns, denoiser, manifest.pipeline.diffusers)
        self._watch = Watch(denoiser)
        self._modules = self._watch.fingerprint
        self._state = state_of_denoiser(denoiser, baseline="none")
        self._loaded = self._weights = bit_sums(denoiser)
        self._sampler = WeightSamples()
        self._samples: list[tuple[int, int]] | None = None  # those of the last complete check

    @property
    def folder(self) -> str:
        """The folder of the bundle."""
        return str(self._bundle.folder)

    @property
    def open_graphs(self) -> tuple[str, ...]:
        """The names of the graphs that are currently open."""
        return tuple(name for name, _ in self._sessions)

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

        Within a generation, samples of the weights are compared first: reading all of them at each step, as is
        necessary with callbacks, would take as long as a step of a small graph.

        Raises:
            BundleError: the denoiser has changed, and the graphs cannot be refitted.
            BackendError: the runtime cannot refit a graph.
        """
        same = self._watch.refresh()
        samples = self._sampler.of(list(plain_tensors(self.denoiser).values()))
        if same and not begins and samples == self._samples:
            return
        weights, self._samples = bit_sums(self.denoiser), samples
        if self._watch.fingerprint != self._modules:
            changed = what_differs(state_of_denoiser(self.denoiser, baseline="none"), self._state, there="then")
            what = f" ({'; '.join(changed)})" if changed else ""
            raise BundleError(MSG_CHANGED.format(folder=self._bundle.folder, what=what))
        if weights != self._weights:
            for session in self._sessions.values():
                self._refit(session)
            self._opened.clear()  # so that the values of preludes and tables are computed again
            self._weights = weights

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        """Return the values that the graph of `phase` emits for `call`, which the bundle must support."""
        name, graph = self._graph(phase)
        sizes = self._sizes(name, call, argument_names(call, forward))
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
            name, graph = self._graph(phase)
            device = next(leaf.device for leaf in call.leaves if torch.is_tensor(leaf))
            parts = early_graphs(self._bundle.manifest.graphs, name)
            for each in () if self._sequential else (*parts, name):
                self._session(each, device)
            self._opened[key] = BundledGraph(
                name,
                graph,
                self._parts(parts),
                self._bundle.manifest.denoiser.bindings,
                self._sequential,
                argument_names(call, forward),
                lambda which: self._session(which, device),
                emitted,
                self._put,
            )
        return self._opened[key]

    def _parts(self, names: Sequence[str]) -> BundledParts | None:
        graphs = self._bundle.manifest.graphs
        parts = {}
        for name in names:
            graph = graphs[name]
            taken = (*graph.inputs, *graph.early_inputs)
            parts[graph.stage] = BundledPart(
                name, tuple(spec.name for spec in taken), tuple(spec.name for spec in graph.outputs)
            )
        return BundledParts(parts.get("prelude"), parts.get("table")) if parts else None

    def _session(self, name: str, device: torch.device) -> Session:
        key = (name, device)
        if key not in self._sessions:
            if self._sequential:
                self._sessions.clear()
                return_freed_memory()
            graph = self._bundle.manifest.graphs[name]
            session = self._functions.open_graph(graph, self._bundle.folder, device, self._options)
            if self._weights != self._loaded:
                self._refit(session)
            self._sessions[key] = session
        return self._sessions[key]

    def _refit(self, session: Session) -> None:
        if not isinstance(session, Refittable):
            raise BundleError(MSG_CHANGED.format(folder=self._bundle.folder, what=""))
        session.refit(live_tensors(self.denoiser))

    def _graph(self, phase: Phase) -> tuple[str, Graph]:
        if phase not in self._graphs:
            needed = f"{phase.name}, {'with' if phase.guided else 'without'} guidance"
            graphs = ", ".join(name for name, _ in self._graphs.values())
            raise BundleError(
                f"The bundle {self._bundle.folder} has no graph for a step of this call ({needed}). It has {graphs}. "
                "Export a bundle with a call like this one."
            )
        return self._graphs[phase]

    def _sizes(self, name: str, call: Call, names: Sequence[str]) -> Mapping[str, int]:
        """Check `call` against the graph `name` and its prelude and table, and return its free sizes."""
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
        graphs = self._bundle.manifest.graphs
        specs = {spec.name: spec for each in (name, *early_graphs(graphs, name)) for spec in graphs[each].inputs}
        taken = list(specs.values())
        inputs = [_as(spec, given[spec.name]) for spec in taken]
        sizes = solve([spec.shape for spec in taken], [tuple(tensor.shape) for tensor in inputs])
        right_dtypes = all(dtype_name(t.dtype) == spec.dtype for t, spec in zip(inputs, taken, strict=True))
        if sizes is not None and right_dtypes and self._within(sizes):
            return sizes
        self._check_pixels(taken, inputs)
        expected = [_shown(spec) for spec in taken]
        found = [_shown_tensor(spec.name, tensor) for spec, tensor in zip(taken, inputs, strict=True)]
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

    def _check_pixels(self, specs: Sequence[TensorSpec], inputs: Sequence[torch.Tensor]) -> None:
        """Raise BundleError, with sizes in pixels, if the graph does not support the images' height or width."""
        manifest = self._bundle.manifest
        limits = {name: (size.least, size.most) for name, size in manifest.sizes.items()}
        for spec, tensor in zip(specs, inputs, strict=True):
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
    return _float_time(tensor) if spec.dtype == "float32" else tensor


def _float_time(timestep: Any) -> Any:
    return timestep.float() if torch.is_tensor(timestep) and not timestep.is_floating_point() else timestep


def _exactly(constants: Mapping[str, object]) -> dict[str, tuple[type, object]]:
    """Return the constants with their types: True == 1 == 1.0, but the graphs captured for them differ."""
    return {name: (type(value), value) for name, value in constants.items()}


def _arguments(tensors: Sequence[str], constants: Mapping[str, object]) -> str:
    return ", ".join([*sorted(tensors), *(f"{name}={value!r}" for name, value in sorted(constants.items()))])


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _shown_tensor(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {dtype_name(tensor.dtype)}{list(tensor.shape)}"
