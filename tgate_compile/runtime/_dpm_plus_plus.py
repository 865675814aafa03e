"""DPM-Solver++, second-order multistep (arXiv 2211.01095, algorithm 2), in numpy."""

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
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": float("-inf"),
    "variance_type": None,
    "timestep_spacing": "linspace",
}
CHOICES = {
    **COMMON_CHOICES,
    "solver_order": (1, 2),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # diffusers treats the others as "midpoint"
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None,),
}
#: Below this number of steps `lower_order_final` takes effect, as in diffusers.
FEW_STEPS = 15


class DpmPlusPlus:
    """`DPMSolverMultistepScheduler` of diffusers, of order 1 or 2, for a generation of `steps` steps.

    Attributes:
        timesteps: the timestep of each denoiser call, int64, [steps].
        initial_sigma: the factor of the initial noise.
        warm_up: the number of denoiser calls in addition to the steps, which is 0.
    """

    initial_sigma = 1.0
    warm_up = 0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Prepare a generation, or raise ConfigurationError if the configuration is not supported."""
        self._config = checked_config("DPMSolverMultistepScheduler", given, DEFAULTS, CHOICES)
        alphas = cumulative_alphas(self._config)
        if self._config["rescale_betas_zero_snr"]:
            alphas[-1] = NEARLY_ZERO
        training = sigmas_of(alphas)
        if self._config["use_karras_sigmas"]:
            sigmas = karras_sigmas(float(training[-1]), float(training[0]), steps)
            timesteps = timesteps_of(sigmas, training)
            if self._config["beta_schedule"] != "squaredcos_cap_v2":
                timesteps = timesteps.round()
        else:
            timesteps = self._spaced(steps, alphas)
            sigmas = np.interp(timesteps, np.arange(len(training)), training)
        last = training[0] if self._config["final_sigmas_type"] == "sigma_min" else 0.0
        self._sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
        self.timesteps = timesteps.astype(np.int64)
        self._before: Array | None = None

    def model_input(self, latents: Array, step: int) -> Array:
        """Return the denoiser's input for `latents` at `step`."""
        return latents

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """Return the latents after `step`, given the denoiser's `prediction`; steps must be in order."""
        sigma, after = float(self._sigmas[step]), float(self._sigmas[step + 1])
        scale, scale_after = (sigma**2 + 1) ** -0.5, (after**2 + 1) ** -0.5
        clean = self._clean(prediction, latents, sigma, scale)
        towards = clean
        if self._is_second_order(step):
            assert self._before is not None
            earlier = float(self._sigmas[step - 1])
            ratio = np.log(earlier / sigma) / np.log(sigma / after)
            towards = clean + (clean - self._before) * float(0.5 / ratio)
        self._before = clean
        # exp(-h), where h is the difference of the two log-SNRs, is the ratio of the sigmas.
        moved: Array = (after * scale_after) / (sigma * scale) * latents - scale_after * (after / sigma - 1) * towards
        return moved

    def _clean(self, prediction: Array, latents: Array, sigma: float, scale: float) -> Array:
        if self._config["prediction_type"] == "epsilon":
            clean: Array = (latents - sigma * scale * prediction) / scale
        elif self._config["prediction_type"] == "sample":
            clean = prediction
        else:
            clean = scale * latents - sigma * scale * prediction
        return clean

    def _is_second_order(self, step: int) -> bool:
        if self._config["solver_order"] == 1 or step == 0:
            return False
        is_last, few = step == len(self.timesteps) - 1, len(self.timesteps) < FEW_STEPS
        first_order_last = (
            self._config["euler_at_final"]
            or (self._config["lower_order_final"] and few)
            or self._config["final_sigmas_type"] == "zero"
        )
        return not (is_last and first_order_last)

    def _spaced(self, steps: int, alphas: Array) -> Array:
        trained, spacing = int(self._config["num_train_timesteps"]), self._config["timestep_spacing"]
        log_snrs = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))
        most = trained - int(np.searchsorted(log_snrs[::-1], float(self._config["lambda_min_clipped"])))
        if spacing == "linspace":
            return np.linspace(0, most - 1, steps + 1).round()[:0:-1]
        if spacing == "leading":
            return (np.arange(steps + 1) * (most // (steps + 1)))[:0:-1] + int(self._config["steps_offset"])
        return np.arange(most, 0, -trained / steps).round() - 1
