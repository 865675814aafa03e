"""Record a generation's denoiser calls, and run it again under another schedule."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.families import family_of
from tgate_compile.engine.halves import latents_of
from tgate_compile.methods.method import Half, Kind, Phase
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.passes.specialize import specialize
from tgate_compile.pipeline.progress import StepCounter


class DenoiserCalls:
    """Counts the denoiser calls of one generation, of both denoisers where there are two.

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call: whether guidance is on.
    """

    def __init__(self, pipe: DiffusionPipeline, guided: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._order = family_of(type(pipe)).order
        self._separate = family_of(type(pipe)).calls
        self._guided = guided
        self._counter: StepCounter | None = None
        self._calls = 0

    def next(self) -> tuple[int, tuple[Half, ...]]:
        """The step of the next call, and the halves in its batch, in their order; none if guidance is off."""
        if self._counter is None:
            self._counter = StepCounter.of(self._pipe.scheduler, None)  # the timesteps are set by now
        guided = self._guided()
        per_timestep = max(1, len(self._separate)) if guided else 1
        timestep, part = divmod(self._calls, per_timestep)
        self._calls += 1
        halves: tuple[Half, ...] = ()
        if guided:
            halves = (self._separate[part],) if self._separate else self._order
        return self._counter.step(timestep), halves


@dataclass(frozen=True)
class Sample:
    """The output of one attention for one guidance half at one step. Its numbers stay on the device: reading each of
    them at once would stop a GPU at every attention.

    Attributes:
        site: the attention's path, with the denoiser's name in front.
        kind: of attention.
        half: None if the halves are not told apart, or there is no guidance.
        step: from 0.
        norm: ||o_i||, [].
        change: ||o_i - o_(i-1)||, []; None at the first step.
        apart: the distance from the other half at the same step, []; None if that comes later, or not at all.
    """

    site: str
    kind: Kind
    half: Half | None
    step: int
    norm: torch.Tensor
    change: torch.Tensor | None
    apart: torch.Tensor | None


class Recorder:
    """Records one generation of a plain pipeline.

    Args:
        pipe: the pipeline.
        guided: whether guidance is on, called at each denoiser call.
        kinds: of attention.
        halves: tell the guidance halves apart.

    Attributes:
        rows: by denoiser, the batches of its calls added up.
        steps: by denoiser, the steps that it has been called for.
        samples: in the order of the calls.
        seconds: spent on graphs of denoisers whose attentions are no modules to hook, which no plain generation needs.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        guided: Callable[[], bool],
        *,
        kinds: Collection[Kind] = frozenset({"cross"}),
        halves: bool = False,
    ) -> None:
        self._calls = DenoiserCalls(pipe, guided)
        self._kinds = kinds
        self._tell_halves = halves
        self._step = -1
        self._halves: tuple[Half, ...] = ()
        # As large as T-GATE's own caches, twice under guidance.
        self._last: dict[tuple[str, Half | None], tuple[int, torch.Tensor]] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.steps: dict[str, set[int]] = defaultdict(set)
        self.samples: list[Sample] = []
        self.seconds = 0.0

    @property
    def changes(self) -> dict[int, list[float]]:
        """By step, the change of each output since the step before, relative to its norm."""
        changes: dict[int, list[float]] = defaultdict(list)
        for sample in self.samples:
            if sample.change is not None:
                changes[sample.step].append((sample.change / sample.norm.clamp_min(1e-12)).item())
        return changes

    @contextmanager
    def recording(self, denoisers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Record one call of the pipeline; afterwards its denoisers are as they were."""
        with ExitStack() as stack:
            for name, denoiser in denoisers.items():
                attentions = [(path, module) for path, module in denoiser.named_modules() if hasattr(module, "to_k")]
                graphs = None if attentions else _Graphs(denoiser, self._kinds)
                hook = self._on_call(name, graphs)
                stack.enter_context(removed(denoiser.register_forward_pre_hook(hook, with_kwargs=True)))
                for path, module in attentions:
                    hook = self._on_output(f"{name}.{path}")
                    stack.enter_context(removed(module.register_forward_hook(hook, with_kwargs=True)))
            yield
        self._last.clear()

    def _on_call(self, name: str, graphs: _Graphs | None) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._step, self._halves = self._calls.next()
            self.steps[name].add(self._step)
            latents = latents_of(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            self.rows[name] += latents.shape[0]
            if graphs is not None:
                began = time.perf_counter()
                for kind, site, value in graphs.values(Call.of(args, kwargs)):
                    self._record_halves(f"{name}.{site}", kind, value)
                self.seconds += time.perf_counter() - began

        return hook

    def _on_output(self, site: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kind = kind_of(module, args, kwargs)
            if kind in self._kinds and torch.is_tensor(output):
                self._record_halves(site, kind, output)

        return hook

    def _record_halves(self, site: str, kind: Kind, output: torch.Tensor) -> None:
        if not self._tell_halves or not self._halves:
            self._record(site, kind, None, output)
            return
        for half, part in zip(self._halves, output.chunk(len(self._halves)), strict=True):
            self._record(site, kind, half, part)

    def _record(self, site: str, kind: Kind, half: Half | None, output: torch.Tensor) -> None:
        step, before = self._last.get((site, half), (-1, None))
        if step == self._step:
            return  # one call tells enough of a step that has several
        now = output.detach()
        change = apart = None
        if before is not None and before.shape == now.shape:
            change = _distance(now, before)
        if half is not None:
            step, other = self._last.get((site, "uncond" if half == "cond" else "cond"), (-1, now))
            if step == self._step and other.shape == now.shape:
                apart = _distance(now, other)
        self.samples.append(Sample(site, kind, half, self._step, torch.linalg.vector_norm(now.float()), change, apart))
        self._last[site, half] = (self._step, now)


class _Graphs:
    """The attentions of a denoiser that has none of diffusers' kind: found in its graph, which is run beside it."""

    def __init__(self, denoiser: torch.nn.Module, kinds: Collection[Kind]) -> None:
        self._denoiser = denoiser
        self._kinds = frozenset(kinds)
        self._ready: dict[Hashable, tuple[Captured, Variant]] = {}
        self._capturing = False

    @torch.no_grad()
    def values(self, call: Call) -> Iterator[tuple[Kind, str, torch.Tensor]]:
        """The kind, the name and the output of each attention for the inputs of `call`; none if there are none."""
        if self._capturing:
            return  # the export calls the denoiser, and with it the hook that has asked for it
        captured, variant = self._ready.get(call.key) or self._capture(call)
        live = {**dict(self._denoiser.named_parameters()), **dict(self._denoiser.named_buffers())}
        constants = variant.program.constants
        weights = [live[name] if name in live else constants[name] for name in variant.weights]
        given = dict(zip(captured.input_names, call.leaves, strict=True))
        outputs = variant.program.graph_module(*weights, *(given[name] for name in variant.inputs))
        emitted = outputs[captured.out_spec.num_leaves :]
        for emission, value in zip(variant.emitted, emitted, strict=True):
            yield emission.site.kind, emission.site.name, value

    def _capture(self, call: Call) -> tuple[Captured, Variant]:
        self._capturing = True
        try:
            captured = capture(self._denoiser, self._denoiser.forward, call, self._kinds, required=False)
        finally:
            self._capturing = False
        self._ready[call.key] = captured, specialize(captured, Phase(guided=False, emit=self._kinds))
        return self._ready[call.key]


def kind_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """What an attention is, by its own word (most say it), or by whether this call gives it another sequence to look
    at (LTX's)."""
    says = getattr(module, "is_cross_attention", None)
    if says is None:
        says = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None) is not None
    return "cross" if says else "self"


@contextmanager
def removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """A hook that is gone afterwards."""
    try:
        yield
    finally:
        handle.remove()


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    distance: torch.Tensor = torch.linalg.vector_norm(a.float() - b.float())
    return distance
