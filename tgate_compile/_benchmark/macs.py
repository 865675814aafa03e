"""Counts the multiply-accumulates of a denoiser while it runs, whoever has changed it: for pipelines without graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tgate_compile._tuning.recorder import removed

# Linear and convolution layers, the paper's convention. Attention's own products are of other operators.
_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiply-accumulates in linear and convolution layers, while it is on.

    PyTorch's FlopCounterMode counts the same, but also walks the modules, and does not come to an end where a package
    has put one into itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        packet = func._overloadpacket
        if packet in _LAYERS:
            self.macs += flop_registry[packet](*args, **given, out_val=result) / 2
        return result


@contextmanager
def macs_counted(denoisers: Mapping[str, torch.nn.Module]) -> Iterator[Count]:
    """Inside, the calls of `denoisers` are counted; what is compiled cannot be."""
    count = Count()
    running = ExitStack()

    def begin(*_: Any) -> None:
        running.enter_context(count)

    def end(*_: Any) -> None:
        running.close()

    with ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(removed(denoiser.register_forward_pre_hook(begin)))
            stack.enter_context(removed(denoiser.register_forward_hook(end, always_call=True)))
        yield count
