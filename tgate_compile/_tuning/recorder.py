"""What the attentions of a plain generation put out, and how much that changes from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._schedule import Half, Kind
from tgate_compile._tuning.denoiser_calls import DenoiserCalls


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
                stack.enter_context(removed(denoiser.register_forward_pre_hook(self._on_call(name), with_kwargs=True)))
                for path, module in denoiser.named_modules():
                    if hasattr(module, "to_k"):
                        hook = self._on_output(f"{name}.{path}")
                        stack.enter_context(removed(module.register_forward_hook(hook, with_kwargs=True)))
            yield
        self._last.clear()

    def _on_call(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._step, self._halves = self._calls.next()
            self.steps[name].add(self._step)
            latents: torch.Tensor = (*args, *kwargs.values())[0]
            self.rows[name] += latents.shape[0]

        return hook

    def _on_output(self, site: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kind = kind_of(module, args, kwargs)
            if kind not in self._kinds or not torch.is_tensor(output):
                return
            if not self._tell_halves or not self._halves:
                self._record(site, kind, None, output)
                return
            for half, part in zip(self._halves, output.chunk(len(self._halves)), strict=True):
                self._record(site, kind, half, part)

        return hook

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
