"""Euler's method for the probability flow ODE (arXiv 2206.00364, algorithm 1 without churn) and for flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tgate_compile.runtime._noise import (
    COMMON,
    COMMON_CHOICES,
    NEARLY_ZERO,
    Array,
    checked_config,
    cumulative_alphas,
    karras_sigmas,
    sigmas_of,
    timesteps_of,
)

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}
CHOICES = {
    **COMMON_CHOICES,
    "interpolation_type": ("linear",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
}


class Euler:
    """`EulerDiscreteScheduler` of diffusers without churn, for a generation of `steps` steps.

    Attributes:
        timesteps: the timestep of each denoiser call, float32, [steps]; not always an integer.
        initial_sigma: the factor of the initial noise.
        warm_up: the number of denoiser calls in addition to the steps, which is 0.
    """

    warm_up = 0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Prepare a generation, or raise ConfigurationError if the configuration is not supported."""
        self._config = checked_config("EulerDiscreteScheduler", given, DEFAULTS, CHOICES)
        alphas = cumulative_alphas(self._config)
        if self._config["rescale_betas_zero_snr"]:
            alphas[-1] = NEARLY_ZERO
        training = sigmas_of(alphas)
        timesteps = self._spaced(steps)
        sigmas: Array = np.interp(timesteps, np.arange(len(training)), training)
        if self._config["use_karras_sigmas"]:
            largest, smallest = self._config["sigma_max"] or sigmas[0], self._config["sigma_min"] or sigmas[-1]
            sigmas = karras_sigmas(float(largest), float(smallest), steps)
            timesteps = timesteps_of(sigmas, training)
        last = training[0] if self._config["final_sigmas_type"] == "sigma_min" else 0.0
        self._sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
        self.timesteps = timesteps.astype(np.float32)
        largest = float(self._sigmas.max())
        self.initial_sigma = (largest**2 + 1) ** 0.5 if self._config["timestep_spacing"] == "leading" else largest

    def model_input(self, latents: Array, step: int) -> Array:
        """Return the denoiser's input for `latents` at `step`."""
        scaled: Array = latents / float(self._sigmas[step] ** 2 + 1) ** 0.5
        return scaled

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """Return the latents after `step`, given the denoiser's `prediction` for those before it."""
        sigma, after = float(self._sigmas[step]), float(self._sigmas[step + 1])
        if self._config["prediction_type"] == "epsilon":
            clean = latents - sigma * prediction
        elif self._config["prediction_type"] == "sample":
            clean = prediction
        else:
            clean = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + latents / (sigma**2 + 1)
        moved: Array = latents + (latents - clean) / sigma * (after - sigma)
        return moved

    def _spaced(self, steps: int) -> Array:
        trained, spacing = int(self._config["num_train_timesteps"]), self._config["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, trained - 1, steps, dtype=np.float32)[::-1]
        if spacing == "leading":
            offset = np.float32(self._config["steps_offset"])
            return (np.arange(steps) * (trained // steps))[::-1].astype(np.float32) + offset
        return np.arange(trained, 0, -trained / steps).round().astype(np.float32) - 1


FLOW_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
FLOW_CHOICES = {
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


class FlowMatchEuler:
    """`FlowMatchEulerDiscreteScheduler` of diffusers, for a generation of `steps` steps.

    Attributes:
        timesteps: the timestep of each denoiser call, float32, [steps].
        initial_sigma: the factor of the initial noise, which is 1.
        warm_up: the number of denoiser calls in addition to the steps, which is 0.
    """

    initial_sigma = 1.0
    warm_up = 0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Prepare a generation, or raise ConfigurationError if the configuration is not supported."""
        config = checked_config("FlowMatchEulerDiscreteScheduler", given, FLOW_DEFAULTS, FLOW_CHOICES)
        trained, shift = int(config["num_train_timesteps"]), float(config["shift"])
        # diffusers shifts twice: the range, and what is spaced in it.
        spaced = np.linspace(1.0, _shifted(np.float64(1 / trained), shift), steps)
        sigmas = _shifted(spaced, shift).astype(np.float32)
        self.timesteps = sigmas * np.float32(trained)
        self._sigmas = np.append(sigmas, 0.0).astype(np.float64)

    def model_input(self, latents: Array, step: int) -> Array:
        """Return the denoiser's input for `latents` at `step`."""
        return latents

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """Return the latents after `step`, given the denoiser's `prediction` for those before it."""
        moved: Array = latents + prediction * float(self._sigmas[step + 1] - self._sigmas[step])
        return moved


def _shifted(sigmas: Any, shift: float) -> Any:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
