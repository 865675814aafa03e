"""How much the cross-attentions still change from step to step: the observation that T-GATE rests on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tgate_compile._capture import cross_attention_modules
from tgate_compile._families import family_of
from tgate_compile._steps import StepCounter


@dataclass(frozen=True)
class Convergence:
    """The change of the cross-attentions' outputs from each step to the next, ||o_i - o_(i-1)|| / ||o_i||.

    Source: arXiv 2404.02747, figure 2, where it is not relative.

    Attributes:
        mean: over sites and images; the first is that of step 1 to step 0. Empty where no module of the denoiser says
            that it is a cross-attention (LTX's do not).
        spread: the standard deviation.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, changes: Mapping[int, list[float]]) -> Convergence:
        """From the changes at each step."""
        steps = [torch.tensor(changes[step], dtype=torch.float64) for step in sorted(changes)]
        return cls(
            mean=tuple(step.mean().item() for step in steps),
            spread=tuple(step.std(correction=0).item() for step in steps),
        )


class Recorder:
    """What a plain generation does: the denoisers' calls, their steps, the changes of the cross-attentions.

    Attributes:
        rows: by denoiser, the batches of its calls added up.
        steps: by denoiser, the steps that it has been called for.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._family = family_of(type(pipe))
        self._counter: StepCounter | None = None
        self._calls = 0
        self._is_first = False
        self._step = -1
        self._last: dict[str, torch.Tensor] = {}  # as large as T-GATE's own caches, twice under guidance
        self._changes: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.rows: dict[str, int] = defaultdict(int)
        self.steps: dict[str, set[int]] = defaultdict(set)

    @property
    def changes(self) -> dict[int, list[float]]:
        """By step, the relative change of each cross-attention's output since the step before."""
        return {step: [change.item() for change in changes] for step, changes in self._changes.items()}

    @contextmanager
    def recording(self, denoisers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Record one call of the pipeline; afterwards its denoisers are as they were."""
        with ExitStack() as stack:
            for name, denoiser in denoisers.items():
                stack.enter_context(_removed(denoiser.register_forward_pre_hook(self._on_call(name), with_kwargs=True)))
                for path in cross_attention_modules(denoiser):
                    module = denoiser.get_submodule(path)
                    stack.enter_context(_removed(module.register_forward_hook(self._on_output(f"{name}.{path}"))))
            yield
        self._last.clear()

    def _on_call(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._counter is None:
                self._counter = StepCounter.of(self._pipe.scheduler, None)  # the timesteps are set by now
            step = self._counter.step(self._calls // self._calls_per_timestep())
            self._is_first, self._step = step != self._step, step
            self._calls += 1
            self.steps[name].add(step)
            latents: torch.Tensor = (*args, *kwargs.values())[0]
            self.rows[name] += latents.shape[0]

        return hook

    def _calls_per_timestep(self) -> int:
        return max(1, len(self._family.calls)) if getattr(self._pipe, "do_classifier_free_guidance", False) else 1

    def _on_output(self, site: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._is_first or not torch.is_tensor(output):
                return  # one call tells enough of a step that has several
            now = output.detach()
            before = self._last.get(site)
            if before is not None and before.shape == now.shape:
                # No .item() here, which would stop a GPU at each site.
                now32, before32 = now.float(), before.float()
                self._changes[self._step].append((now32 - before32).norm() / now32.norm().clamp_min(1e-12))
            self._last[site] = now

        return hook


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
