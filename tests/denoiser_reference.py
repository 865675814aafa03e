"""T-GATE v1 with plain forward hooks, for all denoisers; like `hook_reference.py`, it uses no tgate_compile code.

If one call carries both guidance halves, the halved arguments are named by hand, not guessed from their shapes.
If each half has a separate call, both are cached at the gate step, and from the gate on the first call of a
timestep computes the prediction that the second one also returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput


class OneCall:
    """One generation of a denoiser whose batch has both guidance halves, or no guidance.

    Args:
        denoiser: the UNet or transformer.
        gate: the first gated step.
        guided: whether the batch has both halves.
        halved: names of the arguments that have rows for both halves, one half after the other. All tensors in
            such an argument do, except the `alternating` ones.
        alternating: names of the tensors in these arguments whose rows alternate between the halves.
        kept: 0 or 1, the position of the half that is computed after the gate.
        further: whether a step has further calls for one half, which repeat the prediction from the gate on.
        listed: names of the halved arguments that are lists with an entry for each row.
        other_dims: halved arguments that have the batch in another dimension than the first.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        gate: int,
        *,
        guided: bool = True,
        halved: Collection[str] = (),
        alternating: Collection[str] = (),
        kept: int = 0,
        further: bool = False,
        listed: Collection[str] = (),
        other_dims: Mapping[str, int] | None = None,
    ) -> None:
        self.further = further
        self.kept_result: Any = None
        self.rows = 0  # of a call with both halves
        self.listed = listed
        self.other_dims = other_dims or {}
        self.original = denoiser.forward
        self.signature = inspect.signature(self.original)
        self.gate = gate
        self.guided = guided
        self.halved = halved
        self.alternating = alternating
        self.kept = kept
        self.step = -1
        self.caches: dict[str, torch.Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        rows = len(kwargs["hidden_states"]) if self.further else self.rows
        self.rows = max(rows, self.rows)
        if rows < self.rows:
            return self.original(*args, **kwargs) if self.step < self.gate else self.kept_result
        self.step += 1
        if self.step < self.gate or not self.guided:
            return self.original(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs).arguments
        halves = {name: self._half(name, value) if name in self.halved else value for name, value in given.items()}
        assert halves.keys() >= set(self.halved)
        self.kept_result = self.original(**{**halves, "return_dict": False})
        doubled = tuple(map(_twice, self.kept_result))
        return doubled if given.get("return_dict") is False else Transformer2DModelOutput(sample=doubled[0])

    def attention(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Return the value that cross-attention `name` passes on, given its computed `output`."""
        if self.step >= self.gate:
            assert self.caches[name].shape == output.shape
            return self.caches[name]
        self.caches[name] = sum(output.chunk(2)) / 2 if self.guided else output
        return output

    def _half(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._half(key, item) for key, item in value.items()}
        if name in self.listed:
            return value[: len(value) // 2] if self.kept == 0 else value[len(value) // 2 :]
        if name in self.other_dims:
            return value.chunk(2, self.other_dims[name])[self.kept]
        if isinstance(value, (list, tuple)):
            return type(value)(self._half(name, item) for item in value)
        if name in self.alternating:
            return value[self.kept :: 2]
        return value.chunk(2)[self.kept]


def _twice(prediction: Any) -> Any:
    return torch.cat([prediction, prediction]) if torch.is_tensor(prediction) else [*prediction, *prediction]


class TwoCalls:
    """One generation of a denoiser that is called for the prompt and then, with guidance, for the negative prompt.

    Args:
        denoiser: the UNet or transformer.
        gate: the first gated step, counted in the steps of this denoiser.
        guided: called at the first call of each timestep; returns whether there will be a second one.
    """

    def __init__(self, denoiser: torch.nn.Module, gate: int, *, guided: Callable[[], bool]) -> None:
        self.original = denoiser.forward
        self.gate = gate
        self.guided = guided
        self.step = -1
        self.is_second = False
        self.has_second = False
        self.caches: dict[str, list[torch.Tensor]] = {}  # of each half
        self.prediction: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        self.is_second = self.has_second
        if not self.is_second:
            self.step += 1
        self.has_second = not self.is_second and self.guided()
        if self.step < self.gate or not self.is_second:
            self.prediction = self.original(*args, **kwargs)
        return self.prediction

    def attention(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Return the value that cross-attention `name` passes on, given its computed `output`."""
        if self.step >= self.gate:
            return sum(self.caches[name]) / len(self.caches[name])
        self.caches[name] = [*self.caches[name], output] if self.is_second else [output]
        return output


@contextmanager
def played(reference: OneCall | TwoCalls, denoiser: torch.nn.Module, sites: Collection[str]) -> Iterator[None]:
    """Hook `reference` into the denoiser, whose cross-attentions are the modules at `sites`, and remove it again."""
    with ExitStack() as stack:
        for name in sites:

            def hook(module: torch.nn.Module, args: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
                return reference.attention(name, output)

            stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
        denoiser.forward = reference.forward  # type: ignore[method-assign, assignment]
        stack.callback(vars(denoiser).pop, "forward")
        yield
