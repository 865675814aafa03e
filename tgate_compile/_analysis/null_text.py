"""Let a plain pipeline go without its prompt at some steps: the prompt's guidance half gets the other half's text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from tgate_compile._call import Call
from tgate_compile._families import Family, family_of
from tgate_compile._halves import check_halves, leaves_at, one_half
from tgate_compile._latents import latents_of
from tgate_compile._schedule import Half
from tgate_compile._tuning.denoiser_calls import DenoiserCalls
from tgate_compile._tuning.recorder import removed


class NullText:
    """Swaps texts at the inputs of a pipeline's denoisers; the pipeline's own code is left alone.

    The null text is what the pipeline gives its uncond half: the empty prompt, or the negative one if there is one,
    with all that belongs to it (pooled text, masks).

    Args:
        pipe: the pipeline.
        guided: whether guidance is on, called at each denoiser call.
    """

    def __init__(self, pipe: DiffusionPipeline, guided: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._family = family_of(type(pipe))
        self._guided = guided
        self._seen: dict[Half, dict[str, Any]] = {}

    @contextmanager
    def learning(self, denoisers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Around a call that is as it should be: where each half has a denoiser call of its own, the prompt's comes
        before its null text has been seen."""
        self._seen = {}
        with self._hooked(denoisers, lambda step: False):
            yield

    @contextmanager
    def replacing(self, denoisers: Mapping[str, torch.nn.Module], at: Callable[[int], bool]) -> Iterator[None]:
        """Around a call that has no text at the steps that `at` says."""
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
        """Whether the halves' first calls, which were for the same latents and timestep, differ in `name`."""
        return not _same(self._seen["cond"].get(name), self._seen["uncond"][name])


def without_text(call: Call, latents: torch.Tensor, family: Family) -> Call:
    """`call`, whose batch has both guidance halves of `latents`, with the uncond half in the place of the cond half.

    Raises:
        UnsupportedModelError: the batch is not two halves of the same latents.
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
