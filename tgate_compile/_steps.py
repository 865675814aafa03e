"""From denoiser call to denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tgate_compile._errors import ConfigurationError

MSG_NO_TIMESTEPS = (
    "The scheduler {scheduler} has no timesteps yet, so steps cannot be counted. Call its set_timesteps() before the "
    "first denoiser call of the generation."
)


@dataclass(frozen=True)
class StepCounter:
    """Which step a denoiser call belongs to. A Heun step makes two calls, PNDM's warm-up call is no step.

    Attributes:
        warmup_calls: calls at the start that belong to step 0 and are no steps of their own.
        calls_per_step: the scheduler's order.
        num_calls: timesteps that the denoiser is called for.
        num_steps: steps of the whole pass.
    """

    warmup_calls: int
    calls_per_step: int
    num_calls: int
    num_steps: int

    @classmethod
    def of(cls, scheduler: Any, num_calls: int | None) -> StepCounter:
        """Count for `scheduler`, whose timesteps are set.

        Args:
            scheduler: a diffusers scheduler.
            num_calls: how many of its timesteps the loop visits (fewer than all for `strength < 1` or
                `denoising_end`); None means all.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise ConfigurationError(MSG_NO_TIMESTEPS.format(scheduler=type(scheduler).__name__))
        order = int(getattr(scheduler, "order", 1))
        requested = getattr(scheduler, "num_inference_steps", None) or -(-len(timesteps) // order)
        # The pipelines' own rule (`num_warmup_steps`): calls beyond steps x order come first and are no steps. They are
        # for timesteps that come again (PNDM); SCM's one more timestep is where the last step ends.
        values = torch.as_tensor(timesteps).tolist()
        warmup = max(len(timesteps) - requested * order, 0) if len(set(values)) < len(values) else 0
        calls = len(timesteps) if num_calls is None else num_calls
        return cls(warmup, order, calls, max(-(-(calls - warmup) // order), 1))

    def step(self, call: int) -> int:
        """The step, from 0, of denoiser call `call`, from 0."""
        return max(call - self.warmup_calls, 0) // self.calls_per_step
