"""Record the inputs of a denoiser's graphs, to quantize them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile.bundle.plan import PlannedGraph, argument_names, cache_name
from tgate_compile.bundle.quantization import Quantization
from tgate_compile.engine.backends import EagerBackend
from tgate_compile.engine.call import Call
from tgate_compile.engine.compiled import CompiledVariant
from tgate_compile.engine.variants import VariantStore
from tgate_compile.engine.weights import live_tensors
from tgate_compile.methods.method import Kind, Phase
from tgate_compile.passes.graphs import Captured, Emission, Variant
from tgate_compile.pipeline.generation import Plan
from tgate_compile.pipeline.hook import GatedDenoiser

#: What a denoiser call was given: caches and arguments, by the bundle's names.
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recorded:
    """One call of one graph: at which step, and with what."""

    step: int
    inputs: Inputs


@dataclass(frozen=True)
class Calibration:
    """Calls of each graph, by its phase, as they were in generations of these prompts."""

    prompts: tuple[str, ...]
    calls: Mapping[Phase, Sequence[Recorded]]

    def inputs_of(self, planned: PlannedGraph) -> list[list[torch.Tensor]]:
        """The inputs of each recorded call, caches last, in the order and with the dtypes of `planned`."""
        own = [value.dtype for value in planned.example_inputs]
        dtypes = [*own, *(site.cache_dtype for site in planned.variant.reused)]
        return [
            [call.inputs[name].cpu().to(dtype) for name, dtype in zip(planned.input_names, dtypes, strict=True)]
            for call in self.calls[planned.variant.phase]
        ]

    def steps_of(self, planned: PlannedGraph) -> list[int]:
        """The step of each."""
        return [call.step for call in self.calls[planned.variant.phase]]


def calibrate(
    pipe: DiffusionPipeline,
    hook: GatedDenoiser,
    plan: Plan,
    call: Mapping[str, Any],
    prompts: Sequence[str],
    most: int,
) -> Calibration:
    """Run the optimized `pipe` for each of `prompts`, and keep what its graphs were given at `most` steps each.

    `plan` is that of `call`, from which everything but the prompt is taken; without prompts, that as well. A prompt's
    generation runs eagerly, to its end, but nothing is decoded.
    """
    own = hook.store
    assert isinstance(own, VariantStore)
    recorder = _Recorder(own, _wanted(hook, plan, getattr(pipe.scheduler, "order", 1), most))
    hook.store = recorder
    own_prompt = call.get("prompt")
    try:
        for prompt in prompts:
            # As many as the call has: graphs may be made for that batch alone.
            shown = [prompt] * len(own_prompt) if isinstance(own_prompt, list) else prompt
            pipe(**{**call, "prompt": shown, "output_type": "latent"})
            recorder.count.clear()
        if not prompts:
            pipe(**{**call, "output_type": "latent"})
    finally:
        hook.store = own
    return Calibration(tuple(prompts), dict(recorder.calls))


def _wanted(hook: GatedDenoiser, plan: Plan, order: int, most: int) -> dict[Phase, dict[int, int]]:
    """For each graph, by its phase: which of its runs, from 0, are kept, and the step of each. First and last are."""
    calls = max(1, len(hook.config.family.calls))
    runs: dict[Phase, list[int]] = defaultdict(list)
    for (step, phase), (graph, _) in zip(plan.steps, plan.graphs, strict=True):
        runs[graph] += [step] * order * (calls if phase.guided else 1)
    return {
        graph: {int(at): steps[int(at)] for at in torch.linspace(0, len(steps) - 1, min(most, len(steps))).round()}
        for graph, steps in runs.items()
    }


class _Recorder:
    """A store whose graphs run eagerly, and keep what they are given."""

    def __init__(self, store: VariantStore, wanted: Mapping[Phase, Mapping[int, int]]) -> None:
        self.denoiser = store.denoiser
        self.folder = store.folder
        self.count: Counter[Phase] = Counter()
        self.calls: dict[Phase, list[Recorded]] = defaultdict(list)
        self._store = store
        self._wanted = wanted

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
        step = self._wanted.get(phase, {}).get(run)
        if step is None:
            return
        named = zip(argument_names(call, forward), call.leaves, strict=True)
        inputs = {name: leaf.clone() for name, leaf in named if torch.is_tensor(leaf)}
        inputs |= {cache_name(site): caches[site.kind, site.name].clone() for site in variant.reused}
        self.calls[phase].append(Recorded(step, inputs))


@dataclass(frozen=True)
class Quantizing:
    """What a format is told.

    Attributes:
        quantization: what is asked for.
        calibration: what all graphs were given in real generations; None: the scheme needs none.
    """

    quantization: Quantization
    calibration: Calibration | None

    def takes(self, planned: PlannedGraph) -> bool:
        """Whether `planned` is to be quantized."""
        return self.quantization.graphs == "all" or bool(planned.variant.phase.reuse)
