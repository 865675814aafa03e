"""Counts the multiply-accumulates of a denoiser while it runs, whoever has changed it: for pipelines without graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tgate_compile._tuning.recorder import removed

# Linear and convolution layers, the paper's convention. Attention's own products are of other operators.
_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)


@dataclass
class Count:
    """Multiply-accumulates in linear and convolution layers."""

    macs: float = 0.0


@contextmanager
def macs_counted(denoisers: Mapping[str, torch.nn.Module]) -> Iterator[Count]:
    """Inside, the calls of `denoisers` are counted; what is compiled cannot be."""
    count = Count()
    running: list[Any] = []  # of FlopCounterMode, which has no types

    def begin(*_: Any) -> None:
        running.append(FlopCounterMode(display=False))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        counter = running.pop()
        counter.__exit__(None, None, None)
        by_operator = counter.get_flop_counts().get("Global", {})
        count.macs += sum(by_operator.get(operator, 0) for operator in _LAYERS) / 2

    with ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(removed(denoiser.register_forward_pre_hook(begin)))
            stack.enter_context(removed(denoiser.register_forward_hook(end, always_call=True)))
        yield count
