"""Joint attention with the text frozen, by patching PyTorch's attention function, without a line of tgate_compile.

The text's tokens are still computed after the gate, but what they hand to the image is discarded: in every joint
attention their keys and values are overwritten with those of the step before the gate. The positions of the text's
tokens are given by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput


@dataclass
class TextReference:
    """One generation of a denoiser with joint attention.

    Attributes:
        denoiser: the transformer.
        gate: the first step that reuses the text's keys and values.
        tokens: the number of all tokens of a joint attention. Attentions of other lengths are left alone.
        text: the positions of the text's tokens among them, or of others that are frozen.
        guided: whether there is guidance, up to the gate.
        halved: names of the arguments that have rows for both halves, also in the tensors of a list or a dict; empty if
            each half is a separate call.
        listed: names of the halved arguments that are lists with an entry for each row.
        kept: the position of the prompt's half, in a batch or among the calls of a step.
        drops_guidance: whether guidance ends at the gate.
        refresh: the text is computed again at every step, from the gate on, that is a multiple of this number.
    """

    denoiser: torch.nn.Module
    gate: int
    tokens: int
    text: slice | Sequence[int]
    guided: bool = True
    halved: Collection[str] = ()
    listed: Collection[str] = ()
    kept: int = 1
    drops_guidance: bool = True
    refresh: int | None = None
    calls: int = 0
    attended: set[int] = field(default_factory=set)  # the steps with a joint attention
    _step: int = -1
    _half: int = 0
    _attention: int = 0
    _caches: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _prediction: Any = None

    _running: bool = False

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.denoiser.forward)
        self._forward = self.denoiser.forward
        self.attention_function = torch.nn.functional.scaled_dot_product_attention

    @property
    def _calls_apart(self) -> bool:
        return self.guided and not self.halved

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser; the attentions of other models, such as a ControlNet, are left alone."""
        self._running = True
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._running = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        self._step, self._half = divmod(self.calls, 2) if self._calls_apart else (self.calls, 0)
        self.calls += 1
        self._attention = 0
        if not self.guided or self._step < self.gate or not self.drops_guidance:
            self._prediction = self.original(*args, **kwargs)
            return self._prediction
        if self._calls_apart:
            # The half that is kept may come second: then the first call has to wait for nothing, as both are equal.
            if self._half == 0:
                self._first = args, kwargs
                if self.kept == 0:
                    self._prediction = self.original(*args, **kwargs)
            return self._prediction
        given = self.signature.bind(*args, **kwargs).arguments
        halves = {name: self._chosen(name, value) if name in self.halved else value for name, value in given.items()}
        assert halves.keys() >= set(self.halved)
        (prediction,) = self.original(**{**halves, "return_dict": False})
        doubled = prediction * 2 if isinstance(prediction, list) else torch.cat([prediction, prediction])
        return (doubled,) if given.get("return_dict") is False else Transformer2DModelOutput(sample=doubled)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `scaled_dot_product_attention`."""
        if self._running and key.shape[-2] == self.tokens:
            self.attended.add(self._step)
            place = self._attention, self._half
            self._attention += 1
            is_computed = self._step < self.gate or (self.refresh is not None and self._step % self.refresh == 0)
            if is_computed:
                self._caches[place] = key[..., self.text, :].clone(), value[..., self.text, :].clone()
            else:
                key, value = key.clone(), value.clone()
                for tensor, cached in zip((key, value), self._caches[place], strict=True):
                    rows = cached.chunk(2)[self.kept] if len(cached) > len(tensor) else cached
                    tensor[..., self.text, :] = rows
        return self.attention_function(query, key, value, *args, **kwargs)

    def _chosen(self, name: str, value: Any) -> Any:
        if name in self.listed:
            half = len(value) // 2
            return value[half:] if self.kept else value[:half]
        if isinstance(value, dict):
            return {key: self._chosen(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._chosen("", item) for item in value]
        return value.chunk(2)[self.kept]


@contextmanager
def frozen_text(reference: TextReference) -> Iterator[TextReference]:
    """Patch the denoiser and PyTorch's attention function inside the context."""
    reference.denoiser.forward = reference.forward  # type: ignore[method-assign, assignment]
    torch.nn.functional.scaled_dot_product_attention = reference.attention
    try:
        yield reference
    finally:
        torch.nn.functional.scaled_dot_product_attention = reference.attention_function
        del reference.denoiser.forward
