"""T-GATE v1 with plain forward hooks: slow, obvious, and without a line of tgate_compile.

Cross-attentions are still computed after the gate, but the results discarded. Rules from arXiv 2404.02747 v1,
section 3.2: full steps until the gate; the cache is each cross-attention's output at the last full step, the mean of
the guidance halves; from the gate on, the cached value is used, and only the kept half is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class HookReference:
    """State of one generation with hooks.

    Args:
        denoiser: a UNet or transformer whose cross-attentions are the modules called `attn2`.
        gate: the first gated step.
        guided: whether the batch is [uncond; cond]; a function if that changes during the generation.
        keep: which half is computed after the gate.
        interleaved: whether the rows of SDXL's `time_ids` alternate between the halves.
        calls_per_step: denoiser calls of one step (2 for Heun and KDPM2).
        warmup_calls: number of first calls that do not count as steps (1 for PNDM).
        anchor: the weight of the cond half in the cache.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        gate: int,
        *,
        guided: bool | Callable[[], bool] = True,
        keep: str = "uncond",
        interleaved: bool = False,
        calls_per_step: int = 1,
        warmup_calls: int = 0,
        anchor: float = 0.5,
    ) -> None:
        self.denoiser = denoiser
        self.gate = gate
        self.guided = guided if callable(guided) else lambda: guided
        self.keep = keep
        self.interleaved = interleaved
        self.calls_per_step = calls_per_step
        self.warmup_calls = warmup_calls
        self.anchor = anchor
        self.calls = 0
        self.step = 0
        self.cache: dict[str, torch.Tensor] = {}
        self.original = denoiser.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        self.step = max(self.calls - self.warmup_calls, 0) // self.calls_per_step
        self.calls += 1
        if self.step < self.gate or not self.guided():
            return self.original(*args, **kwargs)
        batch = args[0].shape[0]
        conditions = dict(kwargs.get("added_cond_kwargs") or {})
        time_ids = conditions.pop("time_ids", None)
        half_args = self._half(args, batch)
        half_kwargs = self._half({**kwargs, "added_cond_kwargs": conditions}, batch)
        if time_ids is not None and self.interleaved:
            half_kwargs["added_cond_kwargs"]["time_ids"] = time_ids[0::2] if self.keep == "uncond" else time_ids[1::2]
        elif time_ids is not None:
            half_kwargs["added_cond_kwargs"]["time_ids"] = self._half(time_ids, batch)
        (prediction,) = self.original(*half_args, **{**half_kwargs, "return_dict": False})
        doubled = torch.cat([prediction, prediction])
        return (doubled,) if kwargs.get("return_dict") is False else type("Output", (), {"sample": doubled})

    def attention_hook(self, name: str) -> Any:
        """A forward hook for the cross-attention `name`."""

        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self.step >= self.gate:
                assert self.cache[name].shape == output.shape
                return self.cache[name]
            if self.guided():
                uncond, cond = output.chunk(2)
                self.cache[name] = (1 - self.anchor) * uncond + self.anchor * cond
            else:
                self.cache[name] = output
            return output

        return hook

    def _half(self, value: Any, batch: int) -> Any:
        if isinstance(value, dict):
            return {key: self._half(item, batch) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._half(item, batch) for item in value)
        if torch.is_tensor(value) and value.ndim and value.shape[0] == batch:
            uncond, cond = value.chunk(2)
            return uncond if self.keep == "uncond" else cond
        return value


@contextmanager
def hook_reference(pipe: Any, gate: int, **options: Any) -> Iterator[HookReference]:
    """Run one generation of the plain pipeline `pipe` with T-GATE, and restore the denoiser afterwards."""
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    reference = HookReference(denoiser, gate, **options)
    sites = {name: module for name, module in denoiser.named_modules() if name.endswith("attn2")}
    assert sites
    handles = [module.register_forward_hook(reference.attention_hook(name)) for name, module in sites.items()]
    denoiser.forward = reference.forward
    try:
        yield reference
    finally:
        del denoiser.forward
        for handle in handles:
            handle.remove()
