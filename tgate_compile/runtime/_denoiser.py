"""The denoiser of a bundle: its graphs, chosen step by step, with the caches carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tgate_compile._errors import BundleError
from tgate_compile.bundle.manifest import (
    Graph,
    Manifest,
    PlannedPhase,
    Source,
    TensorSpec,
    phase_of,
    return_freed_memory,
)
from tgate_compile.bundle.read_manifest import solve, wrong_pixels
from tgate_compile.methods.method import Half, Kind
from tgate_compile.runtime._noise import Array
from tgate_compile.runtime._session import Session, Settings, detached, ort_value

if TYPE_CHECKING:
    from onnxruntime import OrtValue

MSG_NO_GRAPH = (
    "The bundle {folder} has no graph for what this call needs ({phase}, {guidance} guidance). It has {graphs}. Export "
    "one with a call like this one."
)

MSG_PIXELS = (
    "In images of the bundle {folder}, {wrong}. Ask for images of such a size, or export a bundle for this one."
)

#: For each half of guidance, what is known of it besides latents and timesteps; the first dimension is that of images.
Conditions = Mapping[Half, Mapping[Source, Array]]


class Graphs:
    """The graphs of a bundle, each opened when it is first needed; if they are `sequential`, one at a time."""

    def __init__(self, manifest: Manifest, folder: Path, settings: Settings, *, sequential: bool = False) -> None:
        self._manifest = manifest
        self._folder = folder
        self._settings = settings
        self._sessions: dict[str, Session] = {}
        self._sequential = sequential

    @property
    def open(self) -> tuple[str, ...]:
        """The names of the graphs that are open now."""
        return tuple(self._sessions)

    def close(self) -> None:
        """Close all."""
        self._sessions.clear()
        return_freed_memory()

    def prepare(self, plan: Sequence[PlannedPhase]) -> None:
        """Open those that serve `plan`, as long as they may be open together; raises what `name` and `session` do."""
        for name in dict.fromkeys(map(self.name, plan)):
            if not self._sequential:
                self.session(name)

    def name(self, planned: PlannedPhase) -> str:
        """Return the name of the graph that serves a step; raises BundleError if there is none."""
        if planned.graph is None:
            phase = phase_of(planned.phase)
            raise BundleError(
                MSG_NO_GRAPH.format(
                    folder=self._folder,
                    phase=phase.name,
                    guidance="with" if phase.guided else "without",
                    graphs=", ".join(self._manifest.graphs),
                )
            )
        return planned.graph

    def session(self, name: str) -> Session:
        """Return the graph of this name, open.

        Raises:
            BackendError: ONNX Runtime does not take it.
        """
        if name not in self._sessions:
            graph = self._manifest.graphs[name]
            if self._sequential:
                self.close()
            self._sessions[name] = Session(self._folder / graph.file, *_specs(graph), self._settings)
        return self._sessions[name]

    def kept(self, value: OrtValue) -> OrtValue:
        """`value`, which a graph has returned, so that it may be held when that graph is closed."""
        return detached(value) if self._sequential else value


class Denoiser:
    """The denoiser of one generation. Calls come in the order of the steps."""

    def __init__(
        self,
        graphs: Graphs,
        manifest: Manifest,
        folder: Path,
        plan: Sequence[PlannedPhase],
        conditions: Conditions,
    ) -> None:
        """Of the steps of `plan`; under guidance, `conditions` has both halves."""
        assert manifest.components is not None
        self._graphs = graphs
        self._manifest = manifest
        self._folder = folder
        self._sources = manifest.components.arguments
        self._conditions = conditions
        self._guided = len(conditions) == 2
        self._plan = plan
        self._caches: dict[tuple[Kind, str], OrtValue] = {}
        self._made: dict[tuple[bool, str], OrtValue] = {}
        self._checked: set[str] = set()

    @property
    def plan(self) -> Sequence[PlannedPhase]:
        """What each step does."""
        return self._plan

    def open_graphs(self) -> None:
        """Open all that the plan needs and that may be open together; raises what `Graphs.prepare` does."""
        self._graphs.prepare(self._plan)

    def graph_name(self, step: int) -> str:
        """Of the graph that serves `step`."""
        return self._graphs.name(self._plan[step])

    def __call__(self, step: int, latents: Array, timestep: float, guidance_scale: float) -> Array:
        """The prediction for `latents`, [images, channels, h, w], with guidance where the step has it.

        Raises:
            BundleError: the graph is made for other shapes.
            BackendError: ONNX Runtime fails.
        """
        phase = self._plan[step].phase
        served = self._graphs.name(self._plan[step])
        graph = self._manifest.graphs[served]
        inputs = {spec.name: self._argument(spec, latents, timestep, guided=phase.guided) for spec in graph.inputs}
        inputs |= {spec.name: self._caches[spec.kind, spec.site] for spec in graph.cache_inputs}
        if served not in self._checked:
            self._check_shapes(graph, inputs)
            self._checked.add(served)
        outputs = self._graphs.session(served).run(inputs, kept=len(graph.cache_outputs))
        count = len(graph.outputs)
        for spec, value in zip(graph.cache_outputs, outputs[count:], strict=True):
            if spec.kind in (phase.merge if spec.merged else phase.emit):
                self._caches[spec.kind, spec.site] = self._graphs.kept(value)
        prediction: Array = outputs[0].numpy().astype(np.float32)
        if phase.guided:
            halves = dict(zip(self._manifest.family.order, np.split(prediction, 2), strict=True))
            prediction = halves["uncond"] + np.float32(guidance_scale) * (halves["cond"] - halves["uncond"])
        return prediction[:, : latents.shape[1]]  # beyond the latents' channels is a learned variance

    def _argument(self, spec: TensorSpec, latents: Array, timestep: float, *, guided: bool) -> OrtValue:
        source = self._sources[spec.name]
        halves: Sequence[Half] = self._halves(guided)
        if source == "latents":
            return ort_value(np.concatenate([latents] * len(halves)), spec)
        if source == "timestep":
            batch = len(halves) * len(latents)
            return ort_value(np.full((batch,) * len(spec.shape), timestep), spec)  # one number, or one for each row
        key = (guided, spec.name)
        if key not in self._made:
            value = np.concatenate([self._conditions[half][source] for half in halves])
            self._made[key] = ort_value(value, spec)
        return self._made[key]

    def _halves(self, guided: bool) -> Sequence[Half]:
        if guided:
            return self._manifest.family.order
        return (self._manifest.method.keep,) if self._guided else tuple(self._conditions)

    def _check_pixels(self, graph: Graph, inputs: Mapping[str, OrtValue]) -> None:
        """Raise BundleError, which says it in pixels, if the images' height or width does not suit the graph."""
        limits = {name: (size.least, size.most) for name, size in self._manifest.sizes.items()}
        pixels = self._manifest.pipeline.vae_scale_factor
        for spec in graph.inputs:
            if spec.name == self._manifest.denoiser.latents:
                wrong = wrong_pixels(spec.shape, inputs[spec.name].shape(), pixels, limits)
                if wrong:
                    raise BundleError(MSG_PIXELS.format(folder=self._folder, wrong=wrong))

    def _check_shapes(self, graph: Graph, inputs: Mapping[str, OrtValue]) -> None:
        specs = [*graph.inputs, *graph.cache_inputs]
        shapes = [inputs[spec.name].shape() for spec in specs]
        sizes = solve([spec.shape for spec in specs], shapes)
        if sizes is None:
            self._check_pixels(graph, inputs)
            pairs = zip(specs, shapes, strict=True)
            others = [(spec, shape) for spec, shape in pairs if solve([spec.shape], [shape]) is None]
            others = others or list(zip(specs, shapes, strict=True))[:1]
            expected = ", ".join(f"{spec.name} {spec.shape}" for spec, _ in others)
            given = ", ".join(f"{spec.name} {list(shape)}" for spec, shape in others)
            raise BundleError(
                f"The bundle {self._folder} is made for {expected}, but this call has {given}. Ask for images of "
                "another size, or for another number at a time, or export a bundle that takes these."
            )
        for name, value in sizes.items():
            limits = self._manifest.sizes[name]
            if not limits.least <= value <= limits.most:
                raise BundleError(
                    f"The bundle {self._folder} takes {name} from {limits.least} to {limits.most}, but this "
                    f"call has {value}."
                )


def _specs(graph: Graph) -> tuple[list[TensorSpec], list[TensorSpec]]:
    return [*graph.inputs, *graph.cache_inputs], [*graph.outputs, *graph.cache_outputs]
