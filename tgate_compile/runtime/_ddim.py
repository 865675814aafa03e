"""DDIM (arXiv 2010.02502), deterministic, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tgate_compile._errors import ConfigurationError
from tgate_compile.runtime._noise import COMMON, COMMON_CHOICES, Array, checked_config, cumulative_alphas

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "thresholding": False,
    "timestep_spacing": "leading",
}


class Ddim:
    """`DDIMScheduler` of diffusers with `eta=0`, for a generation of `steps` steps.

    Attributes:
        timesteps: the timestep of each denoiser call, int64, [steps].
        initial_sigma: the factor of the initial noise.
        warm_up: the number of denoiser calls in addition to the steps, which is 0.
    """

    initial_sigma = 1.0
    warm_up = 0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Prepare a generation, or raise ConfigurationError if the configuration is not supported."""
        self._config = checked_config("DDIMScheduler", given, DEFAULTS, {**COMMON_CHOICES, "thresholding": (False,)})
        self._alphas = cumulative_alphas(self._config)
        self._stride = self._config["num_train_timesteps"] // steps
        self.timesteps = self._timesteps(steps)
        if self.timesteps[0] >= len(self._alphas):
            raise ConfigurationError(
                f"With {steps} steps and its steps_offset, DDIM starts at timestep {self.timesteps[0]}, but the model "
                f"was trained up to {len(self._alphas) - 1}. Use fewer steps."
            )

    def model_input(self, latents: Array, step: int) -> Array:
        """Return the denoiser's input for `latents` at `step`."""
        return latents

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """Return the latents after `step`, given the denoiser's `prediction` for those before it."""
        timestep = int(self.timesteps[step])
        alpha, alpha_next = self._alpha(timestep), self._alpha(timestep - self._stride)
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self._config["prediction_type"] == "epsilon":
            clean, epsilon = (latents - noise * prediction) / signal, prediction
        elif self._config["prediction_type"] == "sample":
            clean, epsilon = prediction, (latents - signal * prediction) / noise
        else:
            clean, epsilon = signal * latents - noise * prediction, signal * prediction + noise * latents
        if self._config["clip_sample"]:
            clean = np.clip(clean, -self._config["clip_sample_range"], self._config["clip_sample_range"])
        after: Array = alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * epsilon
        return after

    def _alpha(self, timestep: int) -> float:
        if timestep < 0 and self._config["set_alpha_to_one"]:
            return 1.0
        return float(self._alphas[max(timestep, 0)])

    def _timesteps(self, steps: int) -> Array:
        trained, spacing = int(self._config["num_train_timesteps"]), self._config["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, trained - 1, steps).round()[::-1].astype(np.int64)
        if spacing == "leading":
            offset = int(self._config["steps_offset"])
            return (np.arange(steps) * (trained // steps))[::-1].astype(np.int64) + offset
        return np.round(np.arange(trained, 0, -trained / steps)).astype(np.int64) - 1
