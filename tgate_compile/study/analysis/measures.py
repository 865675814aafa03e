"""Measurements during a generation: changes of attention outputs, their curves, and runs without text."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from tgate_compile.engine.call import Call
from tgate_compile.engine.families import Family, family_of
from tgate_compile.engine.halves import check_halves, latents_of, leaves_at, one_half
from tgate_compile.methods.method import Half, Kind
from tgate_compile.study.tuning.recorder import DenoiserCalls, Sample, removed


@dataclass(frozen=True)
class Curve:
    """A quantity as a function of the step.

    Attributes:
        steps: the steps.
        mean: mean over images at each step.
        spread: standard deviation over images at each step.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]


class Tallies:
    """Accumulate curves. Only sums are kept, so memory use does not grow with the number of prompts."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))

    def add(self, key: Hashable, step: int, value: float) -> None:
        """Add one image's value of `key` at a step."""
        sums = self._sums[key][step]
        sums[0] += 1
        sums[1] += value
        sums[2] += value * value

    def add_means(self, key: Hashable, values: Mapping[int, Iterable[float]]) -> None:
        """Add one image's mean of several values at each step."""
        for step, of_step in values.items():
            numbers = list(of_step)
            self.add(key, step, math.fsum(numbers) / len(numbers))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums

    def curve(self, key: Hashable) -> Curve:
        """Return the curve of `key`, which is empty if nothing has been added."""
        by_step = self._sums.get(key, {})
        steps = tuple(sorted(by_step))
        means = tuple(by_step[step][1] / by_step[step][0] for step in steps)
        squares = (by_step[step][2] / by_step[step][0] for step in steps)
        spreads = tuple(math.sqrt(max(s - m * m, 0.0)) for s, m in zip(squares, means, strict=True))
        return Curve(steps, means, spreads)


@dataclass(frozen=True)
class SiteCurves:
    """The curves of one attention.

    Attributes:
        difference: ||o_i - o_(i-1)||, the L2 distance between consecutive steps, over both guidance halves together.
        relative: the difference divided by ||o_i||.
    """

    difference: Curve
    relative: Curve


@dataclass(frozen=True)
class Attentions:
    """The curves of all attentions of one kind.

    Source: arXiv 2404.02747 v1, figure 2, where each point is the mean of the L2 difference between two consecutive
    steps over 1,000 captions and all cross-attentions, and the shaded area shows its spread.

    Attributes:
        difference: mean over sites of ||o_i - o_(i-1)||, over both guidance halves together; the spread is over images.
        relative: mean over sites of ||o_i - o_(i-1)|| / ||o_i||.
        relative_by_half: `relative` for each guidance half, "uncond" and "cond"; "all" without guidance.
        norms: ||o_i|| for each guidance half.
        apart: ||cond - uncond|| / ||cond||; empty without guidance.
        sites: curves of each attention, by site.
    """

    difference: Curve
    relative: Curve
    relative_by_half: Mapping[str, Curve]
    norms: Mapping[str, Curve]
    apart: Curve
    sites: Mapping[str, SiteCurves]


class Collected:
    """Collect the samples recorded for several images."""

    def __init__(self) -> None:
        self._tallies = Tallies()
        self._kinds: dict[str, Kind] = {}

    @property
    def kinds(self) -> dict[Kind, Attentions]:
        """The curves by kind, cross-attentions first; kinds without any attention are omitted."""
        found = set(self._kinds.values())
        kinds: tuple[Kind, ...] = ("cross", "self")
        return {kind: self._attentions(kind) for kind in kinds if kind in found}

    def add(self, samples: Iterable[Sample]) -> None:
        """Add the samples of one image."""
        # The values of all sites, by kind and quantity, then by step.
        values: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        # The squares of norm and change, summed over both halves, by site and step.
        norms: dict[tuple[str, int], float] = defaultdict(float)
        changes: dict[tuple[str, int], float] = defaultdict(float)
        for sample in samples:
            kind, half, step = sample.kind, sample.half or "all", sample.step
            self._kinds[sample.site] = kind
            norm = sample.norm.item()
            values[kind, "norm", half][step].append(norm)
            norms[sample.site, step] += norm**2
            if sample.change is not None:
                change = sample.change.item()
                values[kind, "relative", half][step].append(_ratio(change, norm))
                changes[sample.site, step] += change**2
            if sample.apart is not None:
                values[kind, "apart"][step].append(_ratio(sample.apart.item(), norm))
        for (site, step), square in changes.items():
            difference, relative = math.sqrt(square), _ratio(math.sqrt(square), math.sqrt(norms[site, step]))
            for quantity, value in (("difference", difference), ("relative", relative)):
                values[self._kinds[site], quantity][step].append(value)
                self._tallies.add((quantity, site), step, value)
        for key, by_step in values.items():
            self._tallies.add_means(key, by_step)

    def _attentions(self, kind: Kind) -> Attentions:
        curve = self._tallies.curve
        halves = [half for half in ("uncond", "cond", "all") if (kind, "norm", half) in self._tallies]
        return Attentions(
            difference=curve((kind, "difference")),
            relative=curve((kind, "relative")),
            relative_by_half={half: curve((kind, "relative", half)) for half in halves},
            norms={half: curve((kind, "norm", half)) for half in halves},
            apart=curve((kind, "apart")),
            sites={
                site: SiteCurves(curve(("difference", site)), curve(("relative", site)))
                for site, kind_of_site in self._kinds.items()
                if kind_of_site == kind
            },
        )


def _ratio(value: float, norm: float) -> float:
    return value / max(norm, 1e-12)


class NullText:
    """Replace the text inputs of a pipeline's denoisers, without changes to the pipeline itself.

    The null text is the text of the uncond half: the negative prompt, or the empty prompt if there is none, with the
    inputs that belong to it (pooled embeddings, masks).

    Args:
        pipe: the pipeline.
        guided: called at each denoiser call; returns whether guidance is on.
    """

    def __init__(self, pipe: DiffusionPipeline, guided: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._family = family_of(type(pipe))
        self._guided = guided
        self._seen: dict[Half, dict[str, Any]] = {}

    @contextmanager
    def learning(self, denoisers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Observe an unmodified call of the pipeline, to learn the null text.

        This is needed where each guidance half has a separate denoiser call, because the call for the prompt may come
        before the one with the null text.
        """
        self._seen = {}
        with self._hooked(denoisers, lambda step: False):
            yield

    @contextmanager
    def replacing(self, denoisers: Mapping[str, torch.nn.Module], at: Callable[[int], bool]) -> Iterator[None]:
        """Replace the text with the null text at the steps for which `at` returns true."""
        with self._hooked(denoisers, at):
            yield

    @contextmanager
    def _hooked(self, denoisers: Mapping[str, torch.nn.Module], at: Callable[[int], bool]) -> Iterator[None]:
        calls = DenoiserCalls(self._pipe, self._guided)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step, halves = calls.next()
            if len(halves) == 1:
                return self._in_two_calls(module, args, kwargs, halves[0], replace=at(step))
            if len(halves) == 2 and at(step):
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                return without_text(Call.of(args, kwargs), latents_of(bound.arguments), self._family).arguments
            return None

        with ExitStack() as stack:
            for denoiser in denoisers.values():
                stack.enter_context(removed(denoiser.register_forward_pre_hook(hook, with_kwargs=True)))
            yield

    def _in_two_calls(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], half: Half, *, replace: bool
    ) -> Any:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        self._seen.setdefault(half, dict(bound.arguments))
        if half != "cond" or not replace:
            return None
        texts = {name: value for name, value in self._seen["uncond"].items() if self._is_text(name)}
        bound.arguments.update(texts)
        return bound.args, bound.kwargs

    def _is_text(self, name: str) -> bool:
        """Return whether `name` differs between the first calls of the halves, which share latents and timestep."""
        return not _same(self._seen["cond"].get(name), self._seen["uncond"][name])


def without_text(call: Call, latents: torch.Tensor, family: Family) -> Call:
    """Return `call`, whose batch contains both guidance halves, with the uncond half's inputs in both halves.

    Raises:
        UnsupportedModelError: the batch does not consist of two halves with the same latents.
    """
    check_halves(latents, same=True)
    half = one_half(call, latents.shape[0], "uncond", family)
    interleaved = {id(leaf) for path in family.interleaved for leaf in leaves_at(call, path)}

    def both(whole: Any, part: Any) -> Any:
        if part is whole:
            return whole
        return part.repeat_interleave(2, dim=0) if id(whole) in interleaved else torch.cat([part, part])

    return Call(tuple(both(*pair) for pair in zip(call.leaves, half.leaves, strict=True)), call.spec)


def _same(a: Any, b: Any) -> bool:
    a_leaves, a_spec = pytree.tree_flatten(a)
    b_leaves, b_spec = pytree.tree_flatten(b)
    return a_spec == b_spec and all(
        torch.equal(x, y) if torch.is_tensor(x) and torch.is_tensor(y) else x is y or x == y
        for x, y in zip(a_leaves, b_leaves, strict=True)
    )
