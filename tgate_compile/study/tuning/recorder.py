"""Record the denoiser calls of a generation, and how its attention outputs and residuals change from step to step."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._errors import UnsupportedModelError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.families import family_of, has_joint_attention
from tgate_compile.engine.halves import batch_of
from tgate_compile.engine.tracing import call_of
from tgate_compile.methods.method import BLOCKS, CROSS, MEASURED, Blocks, Half, Kind, Phase, ValueOfBlocks
from tgate_compile.passes.graphs import Captured, Variant
from tgate_compile.passes.specialize import specialize
from tgate_compile.pipeline.progress import StepCounter

logger = logging.getLogger(__name__)


class DenoiserCalls:
    """Count the denoiser calls of one generation; a pipeline with two denoisers has one count for both.

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call; returns whether guidance is on.
    """

    def __init__(self, pipe: DiffusionPipeline, guided: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._order = family_of(type(pipe)).order
        self._separate = family_of(type(pipe)).calls
        self._guided = guided
        self._counter: StepCounter | None = None
        self._calls = 0

    def next(self) -> tuple[int, tuple[Half, ...]]:
        """Return the step of the next call and the guidance halves in its batch, in order; none if guidance is off."""
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
    """Measurements of one attention's output for one guidance half at one step.

    The numbers stay on the device, because reading them immediately would synchronize a GPU at every attention.

    Attributes:
        site: path of the attention, prefixed with the denoiser's name.
        kind: kind of attention.
        half: guidance half; None if halves are not distinguished or guidance is off.
        step: step, from 0.
        norm: ||o_i||, shape [].
        change: ||o_i - o_(i-1)||, shape []; None at the first step.
        apart: distance from the other half at the same step, shape []; None if the other half has not been recorded.
    """

    site: str
    kind: Kind
    half: Half | None
    step: int
    norm: torch.Tensor
    change: torch.Tensor | None
    apart: torch.Tensor | None


@dataclass(frozen=True)
class Convergence:
    """The relative change of the cross-attention outputs between consecutive steps, ||o_i - o_(i-1)|| / ||o_i||.

    Source: arXiv 2404.02747, figure 2, which shows the absolute change.

    Attributes:
        mean: mean over sites and images; the first value compares step 1 with step 0. Empty if the denoiser has no
            cross-attention.
        spread: standard deviation.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, changes: Mapping[int, list[float]]) -> Convergence:
        """Summarize the changes recorded at each step."""
        steps = [torch.tensor(changes[step], dtype=torch.float64) for step in sorted(changes)]
        return cls(
            mean=tuple(step.mean().item() for step in steps),
            spread=tuple(step.std(correction=0).item() for step in steps),
        )


class Recorder:
    """Record one generation of a plain pipeline.

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call; returns whether guidance is on.
        kinds: kinds of attention to record.
        halves: whether to record the guidance halves separately.
        graphs: graphs that earlier recorders have captured for the same denoisers, and to which this one adds its own.

    Attributes:
        rows: sum of the batch sizes of all calls, by denoiser.
        steps: steps at which each denoiser was called.
        samples: recorded samples, in the order of the calls.
        seconds: time spent on graphs of denoisers whose attentions are not modules and cannot be hooked. A plain
            generation does not spend it.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        guided: Callable[[], bool],
        *,
        kinds: Collection[Kind] = frozenset({"cross"}),
        halves: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        self._calls = DenoiserCalls(pipe, guided)
        self._kinds = frozenset(kinds)
        self._graphs: Graphs = {} if graphs is None else graphs
        self._separate_halves = halves
        self._step = -1
        self._halves: tuple[Half, ...] = ()
        # As large as T-GATE's caches; twice as large under guidance.
        self._last: dict[tuple[str, Half | None], tuple[int, torch.Tensor]] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.steps: dict[str, set[int]] = defaultdict(set)
        self.samples: list[Sample] = []
        self.seconds = 0.0

    @property
    def changes(self) -> dict[int, list[float]]:
        """The change of each output since the previous step, relative to its norm, by step."""
        changes: dict[int, list[float]] = defaultdict(list)
        for sample in self.samples:
            if sample.change is not None:
                changes[sample.step].append((sample.change / sample.norm.clamp_min(1e-12)).item())
        return changes

    @contextmanager
    def recording(self, denoisers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Record one call of the pipeline inside the context; the hooks are removed at its end."""
        with ExitStack() as stack:
            for name, denoiser in denoisers.items():
                # In joint attention, the text's keys and values are recorded, which no module returns.
                is_joint = has_joint_attention(type(denoiser))
                modules = [] if is_joint else denoiser.named_modules()
                attentions = [(path, module) for path, module in modules if hasattr(module, "to_k")]
                kinds = self._kinds & CROSS if is_joint else self._kinds
                is_hooked = bool(attentions) or not kinds
                graphs = None if is_hooked else self._graphs.setdefault(name, _Graphs(denoiser, kinds))
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
            arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            self.rows[name] += batch_of(arguments).shape[0]
            if graphs is not None:
                began = time.perf_counter()
                for kind, site, value in graphs.values(call_of(module, args, kwargs, arguments)):
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
        if not self._separate_halves or not self._halves:
            self._record(site, kind, None, output)
            return
        for half, part in zip(self._halves, output.chunk(len(self._halves)), strict=True):
            self._record(site, kind, half, part)

    def _record(self, site: str, kind: Kind, half: Half | None, output: torch.Tensor) -> None:
        step, before = self._last.get((site, half), (-1, None))
        if step == self._step:
            return  # one call is enough for a step with several
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


class Magnitudes:
    """Record how the magnitude of the change that a denoiser's blocks make to their input develops over the steps.

    As in MagCache's calibration (arXiv 2506.09045, section 3.1), and in diffusers' `MagCacheConfig(calibrate=True)`:
    for each token, the norm of the change is divided by its norm one step before, and the mean is taken over all
    tokens, both guidance halves included. The denoiser's graph runs beside the denoiser, so a recorded generation takes
    about twice as long.

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call; returns whether guidance is on.
        denoiser: the denoiser.
        blocks: the range of blocks.
    """

    def __init__(
        self, pipe: DiffusionPipeline, guided: Callable[[], bool], denoiser: torch.nn.Module, blocks: Blocks
    ) -> None:
        self._calls = DenoiserCalls(pipe, guided)
        self._denoiser = denoiser
        self._graphs = _Graphs(denoiser, BLOCKS, [("blocks", blocks)])
        self._last: dict[tuple[str, tuple[Half, ...]], tuple[int, torch.Tensor]] = {}
        self._ratios: dict[int, list[tuple[torch.Tensor, int]]] = defaultdict(list)  # a sum, and the number of tokens
        self._steps: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one call of the pipeline inside the context."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._graphs.capturing:
                return  # the export calls the denoiser, and therefore this hook
            step, halves = self._calls.next()
            self._steps.add(step)
            for _, site, value in self._graphs.values(Call.of(args, kwargs)):
                self._record(site, halves, step, value)

        with removed(self._denoiser.register_forward_pre_hook(hook, with_kwargs=True)):
            yield

    @property
    def ratios(self) -> tuple[float, ...]:
        """The mean ratio at each step; the first is 1."""
        means = []
        for step in sorted(self._steps)[1:]:
            recorded = self._ratios[step]
            total = sum(tokens for _, tokens in recorded)
            means.append(sum(part.item() for part, _ in recorded) / total if total else float("nan"))
        return (1.0, *means)

    def _record(self, site: str, halves: tuple[Half, ...], step: int, value: torch.Tensor) -> None:
        last, before = self._last.get((site, halves), (-1, None))
        if last == step:
            return  # one call is enough for a step with several
        norms = torch.linalg.vector_norm(value.float(), dim=-1)
        if before is not None and before.shape == norms.shape:
            # The same small number as in diffusers, so that the ratios are the same.
            self._ratios[step].append(((norms / (before + 1e-8)).sum(), norms.numel()))
        self._last[site, halves] = (step, norms)


class Changes:
    """Record how much TeaCache's measured values, and the residual over the blocks, change from step to step.

    A change is `mean(abs(value - before)) / mean(abs(before))` over the whole batch of a denoiser call, where `before`
    is the value at the previous step. Pipelines with a call for each guidance half have one series of changes for each.
    The denoiser's graph runs beside the denoiser, once for each of the values.

    Args:
        pipe: the pipeline.
        denoiser: the denoiser.
        values: the measured values. Those that the model does not have are left out, as long as it has one.
    """

    def __init__(self, pipe: DiffusionPipeline, denoiser: torch.nn.Module, values: Sequence[ValueOfBlocks]) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._graphs = {
            value: _Graphs(denoiser, BLOCKS | MEASURED, [("blocks", Blocks()), ("measured", Blocks(0, 1, value))])
            for value in values
        }
        self._last: dict[Hashable, tuple[int, Mapping[Kind, list[torch.Tensor]]]] = {}
        self._recorded: dict[ValueOfBlocks, dict[Hashable, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    @contextmanager
    def recording(self, guided: Callable[[], bool]) -> Iterator[None]:
        """Record one call of the pipeline inside the context, instead of what was recorded before.

        `guided` is called at each denoiser call, and returns whether guidance is on.
        """
        calls = DenoiserCalls(self._pipe, guided)
        self._recorded = {value: defaultdict(list) for value in self._graphs}

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(graphs.capturing for graphs in self._graphs.values()):
                return  # the export calls the denoiser, and therefore this hook
            step, halves = calls.next()
            for value in list(self._graphs):
                self._record(value, halves, step, Call.of(args, kwargs))

        try:
            with removed(self._denoiser.register_forward_pre_hook(hook, with_kwargs=True)):
                yield
        finally:
            self._last.clear()

    @property
    def series(self) -> Mapping[ValueOfBlocks, Sequence[Sequence[tuple[float, float]]]]:
        """For each value, its change and that of the residual at each step from the second one on, in each series."""
        return {
            value: [[(measured.item(), residual.item()) for measured, residual in series] for series in found.values()]
            for value, found in self._recorded.items()
        }

    def _record(self, value: ValueOfBlocks, halves: tuple[Half, ...], step: int, call: Call) -> None:
        last, before = self._last.get((value, halves), (-1, None))
        if last == step:
            return  # one call is enough for a step with several
        now: dict[Kind, list[torch.Tensor]] = defaultdict(list)
        try:
            for kind, _, tensor in self._graphs[value].values(call):
                now[kind].append(tensor.float())
        except UnsupportedModelError as error:
            if len(self._graphs) == 1 or self._recorded[value]:
                raise
            logger.info("not measuring the %s: %s", value, error)
            del self._graphs[value], self._recorded[value]
            return
        if before is not None:
            self._recorded[value][halves].append(
                (_change(now["measured"], before["measured"]), _change(now["blocks"], before["blocks"]))
            )
        self._last[value, halves] = step, now


def _change(values: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the absolute differences, relative to that of the absolute values before, with shape []."""
    differences = [(now - then).abs().sum() for now, then in zip(values, before, strict=True)]
    return torch.stack(differences).sum() / torch.stack([then.abs().sum() for then in before]).sum()


class _Graphs:
    """Compute values inside of a denoiser that no module returns by running its graph as well.

    They are the outputs of attentions that are not diffusers' modules, and residuals over `ranges` of blocks.
    """

    def __init__(
        self, denoiser: torch.nn.Module, kinds: Collection[Kind], ranges: Sequence[tuple[Kind, Blocks]] = ()
    ) -> None:
        self._denoiser = denoiser
        self._kinds = frozenset(kinds)
        self._ranges = tuple(ranges)
        self._ready: dict[Hashable, tuple[Captured, Variant]] = {}
        self._capturing = False

    @property
    def capturing(self) -> bool:
        """Whether the graph is being captured, for which the denoiser is called."""
        return self._capturing

    @torch.no_grad()
    def values(self, call: Call) -> Iterator[tuple[Kind, str, torch.Tensor]]:
        """Yield the kind, name and value of each site for the inputs of `call`."""
        if self._capturing:
            return  # the export calls the denoiser, and therefore the hook that started the export
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
            captured = capture(
                self._denoiser,
                self._denoiser.forward,
                call,
                self._kinds,
                ranges=self._ranges,
                required=bool(self._ranges),
            )
        finally:
            self._capturing = False
        self._ready[call.key] = captured, specialize(captured, Phase(guided=False, emit=self._kinds))
        return self._ready[call.key]


#: The graphs of recorders, by the name of the denoiser.
Graphs = dict[str, _Graphs]


def kind_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """Return the kind of an attention module.

    Most modules have an attribute for it. For the others (such as LTX's), an attention is a cross-attention if this
    call passes it a second sequence.
    """
    is_cross = getattr(module, "is_cross_attention", None)
    if is_cross is None:
        is_cross = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None) is not None
    return "cross" if is_cross else "self"


@contextmanager
def removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end of the context."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_steps(scheduler: Any, call: Callable[[Any], object]) -> Iterator[None]:
    """Call `call` with the result of each step of `scheduler` inside the context.

    A callback would not do, because some pipelines take none.
    """
    step, own = scheduler.step, vars(scheduler).get("step")

    @functools.wraps(step)  # pipelines inspect the signature to see whether it takes a generator
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        call(result)
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:  # someone else has replaced the method, too
            scheduler.step = own


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    distance: torch.Tensor = torch.linalg.vector_norm(a.float() - b.float())
    return distance
