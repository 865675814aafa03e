"""Run the denoiser of a bundle: choose the graph of each step, and pass the caches from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tgate_compile._errors import BundleError
from tgate_compile._machine import return_freed_memory
from tgate_compile.bundle.manifest import (
    CacheInput,
    CacheOutput,
    Manifest,
    PlannedPhase,
    Source,
    TensorSpec,
    phase_of,
)
from tgate_compile.bundle.read_manifest import early_graphs, inputs_of, outputs_of, solve, wrong_pixels
from tgate_compile.methods.decisions import Decider
from tgate_compile.methods.method import Half, Kind, Phase, forecast_weights
from tgate_compile.runtime._noise import Array
from tgate_compile.runtime._session import Session, Settings, detached, ort_value

if TYPE_CHECKING:
    from onnxruntime import OrtValue

#: For each guidance half, the inputs other than latents and timesteps, by source; the first dimension is the batch.
Conditions = Mapping[Half, Mapping[Source, Array]]


class Graphs:
    """The graphs of a bundle, each opened when it is first needed; with `sequential`, only one is open at a time."""

    def __init__(self, manifest: Manifest, folder: Path, settings: Settings, *, sequential: bool = False) -> None:
        self._manifest = manifest
        self._folder = folder
        self._settings = settings
        self._sessions: dict[str, Session] = {}
        self._sequential = sequential

    @property
    def sequential(self) -> bool:
        """Whether only one graph is open at a time."""
        return self._sequential

    @property
    def open(self) -> tuple[str, ...]:
        """The names of the graphs that are currently open."""
        return tuple(self._sessions)

    def close(self) -> None:
        """Close all graphs."""
        self._sessions.clear()
        return_freed_memory()

    def prepare(self, plan: Sequence[PlannedPhase]) -> None:
        """Check that there is a graph for each step of `plan`, and open them and their parts unless `sequential`.

        Raises:
            BundleError: as `name`.
            BackendError: as `session`.
        """
        for name in dict.fromkeys(name for planned in plan for name in self.names(planned)):
            for each in () if self._sequential else (*early_graphs(self._manifest.graphs, name), name):
                self.session(each)

    def name(self, planned: PlannedPhase) -> str:
        """Return the name of the graph that serves a step, or raise BundleError if there is none."""
        if planned.graph is None:
            phase = phase_of(planned.phase)
            steps = [name for name, graph in self._manifest.graphs.items() if graph.stage == "step"]
            raise BundleError(
                f"The bundle {self._folder} has no graph for a step of this call ({phase.name}, "
                f"{'with' if phase.guided else 'without'} guidance). It has {', '.join(steps)}. Export "
                "a bundle with a call like this one."
            )
        return planned.graph

    def names(self, planned: PlannedPhase) -> list[str]:
        """Return the names of all graphs that may serve a step, or raise BundleError if there is none."""
        return [name for name in (self.name(planned), planned.tail, planned.finish) if name is not None]

    def session(self, name: str) -> Session:
        """Return the session of the graph `name`, after opening it if necessary.

        Raises:
            BackendError: ONNX Runtime cannot open the graph.
        """
        if name not in self._sessions:
            graph = self._manifest.graphs[name]
            if self._sequential:
                self.close()
            self._sessions[name] = Session(
                self._folder / graph.file, inputs_of(graph), outputs_of(graph), self._settings
            )
        return self._sessions[name]

    def kept(self, value: OrtValue) -> OrtValue:
        """Return `value`, which a graph has returned, in a form that does not keep this graph open."""
        return detached(value) if self._sequential else value


@dataclass(frozen=True)
class _Call:
    """The latents and the timestep of a call, and whether it has both guidance halves."""

    latents: Array
    timestep: float
    guided: bool


class Denoiser:
    """The denoiser of one generation, which is called for each step in order."""

    def __init__(
        self,
        graphs: Graphs,
        manifest: Manifest,
        folder: Path,
        plan: Sequence[PlannedPhase],
        conditions: Conditions,
        timesteps: Iterable[tuple[int, float]] = (),
    ) -> None:
        """Prepare the steps of `plan`; with guidance, `conditions` has both halves.

        `timesteps` has the step and the timestep of each call to come, as far as they are known.
        """
        assert manifest.components is not None
        self._graphs = graphs
        self._manifest = manifest
        self._folder = folder
        self._sources = manifest.components.arguments
        self._conditions = conditions
        self._guided = len(conditions) == 2
        self._plan = plan
        # The values of the last steps that kept one, newest first, each with its step.
        self._caches: dict[tuple[Kind, str], list[tuple[int, OrtValue]]] = {}
        self._made: dict[tuple[bool, str], OrtValue] = {}
        self._checked: set[str] = set()
        # By graph: the values of its prelude (None), and the rows of its table by timestep.
        self._early: dict[str, dict[float | None, dict[str, OrtValue]]] = {}
        self._times: dict[str, list[float]] = defaultdict(list)  # the timesteps that each graph may serve
        for step, timestep in timesteps:
            for name in graphs.names(plan[step]) if plan[step].graph is not None else ():
                self._times[name].append(timestep)
        rule = manifest.method.rule
        self._decider = None if rule is None else Decider(rule)
        self._settled: dict[int, tuple[str, str]] = {}  # by step: the graph that ran last, and the letter

    def open_graphs(self) -> None:
        """Open the graphs that the plan needs, as `Graphs.prepare` does."""
        self._graphs.prepare(self._plan)

    def ran(self, step: int) -> tuple[str, str]:
        """Return the name of the graph that served `step`, and the letter of the step, once it has run."""
        return self._settled.get(step) or (self._graphs.name(self._plan[step]), self._plan[step].letter)

    def __call__(self, step: int, latents: Array, timestep: float, guidance_scale: float) -> Array:
        """Return the prediction for `latents`, [images, channels, h, w], with guidance if the step has it.

        Raises:
            BundleError: the graph does not support the shapes.
            BackendError: ONNX Runtime fails.
        """
        planned = self._plan[step]
        phase = phase_of(planned.phase)
        call = _Call(latents, timestep, phase.guided)
        if phase.decided:
            prediction = self._decided(step, planned, phase, call)
        else:
            prediction, emitted = self._run(self._graphs.name(planned), step, call, phase)
            self._keep(emitted, step)
            if self._decider is not None:
                self._decider.computed()
        if phase.guided:
            halves = dict(zip(self._manifest.family.order, np.split(prediction, 2), strict=True))
            prediction = halves["uncond"] + np.float32(guidance_scale) * (halves["cond"] - halves["uncond"])
        return prediction[:, : latents.shape[1]]  # further channels are a learned variance

    def _decided(self, step: int, planned: PlannedPhase, phase: Phase, call: _Call) -> Array:
        """Run the head of a step, and the tail or the finish, as the measure decides."""
        rule = self._manifest.method.rule
        assert self._decider is not None
        assert rule is not None
        assert planned.tail is not None
        assert planned.finish is not None
        measure, emitted = self._run(self._graphs.name(planned), step, call, phase.of_part("head"))
        skipped = self._decider.skips(float(measure[0]))
        self._keep([each for each in emitted if each[0].kind == "state"], step)
        served = planned.finish if skipped else planned.tail
        self._settled[step] = served, planned.settled[skipped]
        prediction, kept = self._run(served, step, call, phase.of_part("finish" if skipped else "tail"))
        if not skipped or rule.since == "previous":
            self._keep([each for each in emitted if each[0].kind == "measured"], step)
        self._keep(kept, step)
        self._caches = {key: values for key, values in self._caches.items() if key[0] != "state"}
        return prediction

    def _run(
        self, served: str, step: int, call: _Call, phase: Phase
    ) -> tuple[Array, list[tuple[CacheOutput, OrtValue]]]:
        """Run a graph, and return its first output and the values that `phase` keeps."""
        graph = self._manifest.graphs[served]
        inputs = {spec.name: self._argument(spec, call) for spec in graph.inputs}
        if served not in self._checked:
            self._check_shapes(served, call)
            self._checked.add(served)
        inputs |= self._early_values(served, step, call)
        inputs |= {spec.name: self._forecast(spec, step) for spec in graph.cache_inputs}
        outputs = self._graphs.session(served).run(inputs, kept=len(graph.cache_outputs))
        pairs = zip(graph.cache_outputs, outputs[len(graph.outputs) :], strict=True)
        wanted = phase.emit | (frozenset({"state"}) if phase.part == "head" else frozenset())
        kept = [
            (spec, self._graphs.kept(value)) for spec, value in pairs
            if spec.kind in (phase.merge if spec.merged else wanted)
        ]  # fmt: skip
        first: Array = outputs[0].numpy().astype(np.float32)
        return first, kept

    def _keep(self, emitted: Sequence[tuple[CacheOutput, OrtValue]], step: int) -> None:
        """Keep values of `step`, and as many older ones of the same shape as forecasts need.

        Where steps are decided, values from before a gate do not count after it.
        """
        for spec, value in emitted:
            older = self._caches.get((spec.kind, spec.site), [])
            older = [each for each in older if each[0] != step and each[1].shape() == value.shape()]
            if self._decider is not None:
                older = [each for each in older if self._is_gated(each[0]) == self._is_gated(step)]
            order = self._manifest.method.forecasts.get(spec.kind, 0)
            self._caches[spec.kind, spec.site] = [(step, value), *older[:order]]

    def _is_gated(self, step: int) -> bool:
        return "cross" in self._plan[step].phase.reuse

    def _forecast(self, spec: CacheInput, step: int) -> OrtValue:
        """Return the cached value for `step`, forecast from those of earlier steps if the plan says so.

        The plan cannot have the weights of kinds that are decided at run time, so these are computed here.
        """
        values = self._caches[spec.kind, spec.site]
        weights: Sequence[float] | None = self._plan[step].weights.get(spec.kind)
        if spec.kind in self._plan[step].phase.decided:
            weights = forecast_weights([computed for computed, _ in values], step)
        if weights is None or len(weights) == 1:
            return values[0][1]
        if spec.dtype not in ("float32", "float16"):
            raise BundleError(
                f"The bundle {self._folder} forecasts values of {spec.dtype}, which numpy cannot compute with. Export "
                "it with float32 or float16 caches, or without a forecast."
            )
        total = np.zeros((), np.float32)
        for weight, (_, value) in zip(weights, values[: len(weights)], strict=True):
            total = total + np.float32(weight) * value.numpy().astype(np.float32)
        limit = np.finfo(spec.dtype).max
        return ort_value(np.clip(total, -limit, limit), spec)

    def _early_values(self, served: str, step: int, call: _Call) -> dict[str, OrtValue]:
        """Return the values that the graph `served` takes at `step` from its prelude and its table, by name.

        The prelude runs once, because the prompt stays the same. If only one graph is open at a time, the rows of all
        timesteps that the graph is to serve are computed together. Values that no later step takes are freed.
        """
        needed = {name for planned in self._plan[step:] for name in self._graphs.names(planned)}
        self._early = {name: made for name, made in self._early.items() if name in needed}
        made = self._early.setdefault(served, {})
        values: dict[str, OrtValue] = {}
        for part in early_graphs(self._manifest.graphs, served):
            if self._manifest.graphs[part].stage == "prelude":
                if None not in made:
                    made[None] = self._ran(part, call, {})
                values |= made[None]
            else:
                if call.timestep not in made:
                    ahead = self._times[served] if self._graphs.sequential else ()
                    if not ahead:
                        made = self._early[served] = {time: each for time, each in made.items() if time is None}
                    for timestep in dict.fromkeys((call.timestep, *ahead)):
                        if timestep not in made:
                            made[timestep] = self._ran(part, replace(call, timestep=timestep), values)
                values |= made[call.timestep]
        return {spec.name: values[spec.name] for spec in self._manifest.graphs[served].early_inputs}

    def _ran(self, part: str, call: _Call, known: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        graph = self._manifest.graphs[part]
        inputs = {spec.name: self._argument(spec, call) for spec in graph.inputs}
        inputs |= {spec.name: known[spec.name] for spec in graph.early_inputs}
        outputs = self._graphs.session(part).run(inputs, kept=len(graph.outputs))
        return {spec.name: self._graphs.kept(value) for spec, value in zip(graph.outputs, outputs, strict=True)}

    def _argument(self, spec: TensorSpec, call: _Call) -> OrtValue:
        source = self._sources[spec.name]
        halves: Sequence[Half] = self._halves(call.guided)
        if source == "latents":
            return ort_value(np.concatenate([call.latents] * len(halves)), spec)
        if source == "timestep":
            batch = len(halves) * len(call.latents)
            return ort_value(np.full((batch,) * len(spec.shape), call.timestep), spec)  # a scalar, or one value per row
        key = (call.guided, spec.name)
        if key not in self._made:
            value = np.concatenate([self._conditions[half][source] for half in halves])
            self._made[key] = ort_value(value, spec)
        return self._made[key]

    def _halves(self, guided: bool) -> Sequence[Half]:
        if guided:
            return self._manifest.family.order
        return (self._manifest.method.keep,) if self._guided else tuple(self._conditions)

    def _check_pixels(self, specs: Sequence[TensorSpec], inputs: Mapping[str, OrtValue]) -> None:
        """Raise BundleError, with sizes in pixels, if the graph does not support the images' height or width."""
        limits = {name: (size.least, size.most) for name, size in self._manifest.sizes.items()}
        pixels = self._manifest.pipeline.vae_scale_factor
        for spec in specs:
            if spec.name == self._manifest.denoiser.latents:
                wrong = wrong_pixels(spec.shape, inputs[spec.name].shape(), pixels, limits)
                if wrong:
                    raise BundleError(
                        f"For the bundle {self._folder}, {wrong}. Request images of such a size, or export a bundle "
                        "for this one."
                    )

    def _check_shapes(self, served: str, call: _Call) -> None:
        """Check the shapes of all inputs of the graph `served`, its prelude and its table, before any of them runs."""
        graphs = self._manifest.graphs
        graph = graphs[served]
        arguments = {
            spec.name: spec for each in (served, *early_graphs(graphs, served)) for spec in graphs[each].inputs
        }
        inputs = {name: self._argument(spec, call) for name, spec in arguments.items()}
        inputs |= {spec.name: self._caches[spec.kind, spec.site][0][1] for spec in graph.cache_inputs}
        specs = [*arguments.values(), *graph.cache_inputs]
        shapes = [inputs[spec.name].shape() for spec in specs]
        sizes = solve([spec.shape for spec in specs], shapes)
        if sizes is None:
            self._check_pixels(specs, inputs)
            pairs = zip(specs, shapes, strict=True)
            others = [(spec, shape) for spec, shape in pairs if solve([spec.shape], [shape]) is None]
            others = others or list(zip(specs, shapes, strict=True))[:1]
            expected = ", ".join(f"{spec.name} {spec.shape}" for spec, _ in others)
            given = ", ".join(f"{spec.name} {list(shape)}" for spec, shape in others)
            raise BundleError(
                f"The bundle {self._folder} supports {expected}, but this call has {given}. Request images of another "
                "size, or another number of images at a time, or export a bundle for these."
            )
        for name, value in sizes.items():
            limits = self._manifest.sizes[name]
            if not limits.least <= value <= limits.most:
                raise BundleError(
                    f"The bundle {self._folder} supports {name} from {limits.least} to {limits.most}, but this call "
                    f"has {value}."
                )
