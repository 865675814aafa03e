"""Record the inputs of a denoiser's graphs in real generations, for quantization."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile.bundle.plan import PlannedGraph, argument_names, cache_name, inputs_of
from tgate_compile.bundle.quantization import Quantization
from tgate_compile.engine.backends import EagerBackend
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CompiledVariant
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Captured, Emission, Variant
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.progress import Plan

#: The inputs of a denoiser call, arguments and caches, by name in the bundle.
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recorded:
    """One call of one graph: its step and its inputs."""

    step: int
    inputs: Inputs


@dataclass(frozen=True)
class Calibration:
    """The recorded calls of each graph, by phase, and the prompts of the generations that made them."""

    prompts: tuple[str, ...]
    calls: Mapping[Phase, Sequence[Recorded]]

    def inputs_of(self, planned: PlannedGraph) -> list[list[torch.Tensor]]:
        """Return the inputs of each recorded call, caches last, in the order and with the dtypes of `planned`."""
        dtypes = [node.meta["val"].dtype for node in inputs_of(planned)]
        every = [{**call.inputs, **planned.early_values(call.inputs)} for call in self.calls[planned.variant.phase]]
        return [
            [values[name].cpu().to(dtype) for name, dtype in zip(planned.input_names, dtypes, strict=True)]
            for values in every
        ]

    def steps_of(self, planned: PlannedGraph) -> list[int]:
        """Return the step of each recorded call."""
        return [call.step for call in self.calls[planned.variant.phase]]


def calibrate(
    pipe: DiffusionPipeline,
    hook: GatedDenoiser,
    plan: Plan,
    call: Mapping[str, Any],
    prompts: Sequence[str],
    most: int,
) -> Calibration:
    """Run the optimized `pipe` for each of `prompts`, and record the inputs of each graph at up to `most` of its runs.

    `plan` is the plan of `call`, whose other arguments are used with each prompt. If `prompts` is empty, `call` is run
    with its own prompt. Each generation runs eagerly to the end, but its latents are not decoded.
    """
    own = hook.store
    assert isinstance(own, VariantStore)
    recorder = _Recorder(own, _recorded_runs(hook, plan, getattr(pipe.scheduler, "order", 1), most))
    hook.store = recorder
    own_prompt = call.get("prompt")
    try:
        for prompt in prompts:
            # As many prompts as in the call: graphs may support this batch size only.
            batch = [prompt] * len(own_prompt) if isinstance(own_prompt, list) else prompt
            pipe(**{**call, "prompt": batch, "output_type": "latent"})
            recorder.count.clear()
        if not prompts:
            pipe(**{**call, "output_type": "latent"})
    finally:
        hook.store = own
    return Calibration(tuple(prompts), dict(recorder.calls))


def _recorded_runs(hook: GatedDenoiser, plan: Plan, order: int, most: int) -> dict[Phase, dict[int, int]]:
    """Return the step of each run to record, by the graph's phase and the run's number, which counts from 0.

    The first and the last run of a graph are always among them.
    """
    calls = max(1, len(hook.config.family.calls))
    runs: dict[Phase, list[int]] = defaultdict(list)
    for (step, phase), ((graph, _), *_) in zip(plan.steps, plan.graphs, strict=True):
        runs[graph] += [step] * order * (calls if phase.guided else 1)
    return {
        graph: {int(at): steps[int(at)] for at in torch.linspace(0, len(steps) - 1, min(most, len(steps))).round()}
        for graph, steps in runs.items()
    }


class _Recorder:
    """A store whose graphs run eagerly, and which records their inputs in the given `runs`."""

    def __init__(self, store: VariantStore, runs: Mapping[Phase, Mapping[int, int]]) -> None:
        self.denoiser = store.denoiser
        self.image_rows = store.image_rows
        self.folder = store.folder
        self.count: Counter[Phase] = Counter()
        self.calls: dict[Phase, list[Recorded]] = defaultdict(list)
        self._store = store
        self._runs = runs

    @property
    def site_names(self) -> tuple[str, ...]:
        return self._store.site_names

    @property
    def variants(self) -> list[tuple[Variant, Captured]]:
        return self._store.variants

    def refresh(self, *, begins: bool = True) -> None:
        self._store.refresh(begins=begins)

    def emitted(self, phase: Phase, call: Call, forward: Callable[..., Any]) -> tuple[Emission, ...]:
        return self._store.emitted(phase, call, forward)

    def get(
        self, phase: Phase, call: Call, caches: Mapping[tuple[Kind, str], torch.Tensor], forward: Callable[..., Any]
    ) -> CompiledVariant:
        variant, captured = self._store.variant(phase, call, forward, caches)
        live = live_tensors(self.denoiser)
        weights = [live[name] if name in live else variant.program.constants[name] for name in variant.weights]
        self._record(phase, call, caches, variant, forward)
        return CompiledVariant(variant, captured, EagerBackend({}).compile(variant, ()), weights)

    def _record(
        self,
        phase: Phase,
        call: Call,
        caches: Mapping[tuple[Kind, str], torch.Tensor],
        variant: Variant,
        forward: Callable[..., Any],
    ) -> None:
        run = self.count[phase]
        self.count[phase] += 1
        step = self._runs.get(phase, {}).get(run)
        if step is None:
            return
        named = zip(argument_names(call, forward), call.leaves, strict=True)
        inputs = {name: leaf.clone() for name, leaf in named if torch.is_tensor(leaf)}
        inputs |= {cache_name(site): caches[site.kind, site.name].clone() for site in variant.reused}
        self.calls[phase].append(Recorded(step, inputs))


@dataclass(frozen=True)
class Quantizing:
    """The quantization that a format is asked to write.

    Attributes:
        quantization: the requested quantization.
        calibration: the inputs of all graphs in real generations, or None if the scheme does not need them.
    """

    quantization: Quantization
    calibration: Calibration | None

    def takes(self, planned: PlannedGraph) -> bool:
        """Return whether `planned` is to be quantized."""
        return self.quantization.graphs == "all" or bool(planned.variant.phase.reuse)
