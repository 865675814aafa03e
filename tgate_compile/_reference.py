"""What the denoiser itself computes for a call, to compare graphs with that were made of another call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tgate_compile._call import Call
from tgate_compile._graphs import Site
from tgate_compile._schedule import Kind


class Reference:
    """Runs the denoiser's own code on `call`, at most once for each way that it is asked.

    Args:
        denoiser: the module.
        forward: its original forward.
        call: the inputs.
    """

    def __init__(self, denoiser: torch.nn.Module, forward: Callable[..., Any], call: Call) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._call = call

    @functools.cached_property
    def outputs(self) -> list[torch.Tensor]:
        """The flat outputs."""
        args, kwargs = self._call.arguments
        with torch.no_grad():
            return pytree.tree_leaves(self._forward(*args, **kwargs))

    def outputs_with(
        self, sites: Sequence[Site], caches: Mapping[tuple[Kind, str], torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """The flat outputs with cached values in the places of these `sites`; None if their places are not modules."""
        modules = dict(self._denoiser.named_modules())
        if any(site.kind == "deep" or site.batch or site.name not in modules for site in sites):
            return None
        values = {site.name: caches[site.kind, site.name].to(site.dtype) for site in sites}
        args, kwargs = self._call.arguments
        with torch.no_grad(), _returning({modules[name]: value for name, value in values.items()}):
            return pytree.tree_leaves(self._forward(*args, **kwargs))


def agree(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether a graph's results are the expected ones but for the last bits, which free sizes may change."""
    return len(results) == len(expected) and all(map(_close, results, expected))


@contextmanager
def _returning(values: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Let these modules return these values."""
    with ExitStack() as stack:
        for module, value in values.items():
            hook = module.register_forward_hook(lambda module, args, output, value=value: value)
            stack.callback(hook.remove)
        yield


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    eps = torch.finfo(result.dtype).eps
    tolerance = eps * (64 if eps < 1e-5 else 8)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((result - expected).abs() <= tolerance * scale).all())
