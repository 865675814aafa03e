"""Pseudo numerical methods for diffusion models (arXiv 2202.09778), in numpy: Stable Diffusion's own scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tgate_compile._errors import ConfigurationError
from tgate_compile.runtime._noise import COMMON, COMMON_CHOICES, Array, checked_config, cumulative_alphas

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "skip_prk_steps": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}
CHOICES = {
    **COMMON_CHOICES,
    "prediction_type": ("epsilon", "v_prediction"),
    "skip_prk_steps": (True, False),
}
#: The weights of the latest predictions in a linear multistep of one to four predictions, the latest first.
_WEIGHTS: Sequence[Sequence[float]] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class Pndm:
    """`PNDMScheduler` of diffusers, for a generation of `steps` steps.

    It makes more denoiser calls than there are steps: one more with `skip_prk_steps`, and nine more without.

    Attributes:
        timesteps: the timestep of each denoiser call, int64, [calls].
        initial_sigma: the factor of the initial noise.
        warm_up: the number of additional calls, which come first.
    """

    initial_sigma = 1.0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Prepare a generation, or raise ConfigurationError if the configuration is not supported."""
        self._config = checked_config("PNDMScheduler", given, DEFAULTS, CHOICES)
        # A setting of other schedulers, which PNDM ignores.
        self._alphas = cumulative_alphas({**self._config, "rescale_betas_zero_snr": False})
        self._stride = int(self._config["num_train_timesteps"]) // steps
        spaced = self._spaced(steps)
        if self._config["skip_prk_steps"]:
            self._prk = np.empty(0, dtype=np.int64)
            plms = np.concatenate([spaced[:-1], spaced[-2:-1], spaced[-1:]])[::-1]
        else:
            if steps < 4:
                raise ConfigurationError(
                    "PNDM starts with Runge-Kutta steps, which need 4 steps or more, but num_inference_steps is "
                    f"{steps}. Use more steps, or export the bundle with a scheduler that has skip_prk_steps=True."
                )
            between = spaced[-4:].repeat(2) + np.tile([0, self._stride // 2], 4)
            self._prk = between[:-1].repeat(2)[1:-1][::-1]
            plms = spaced[:-3][::-1]
        self.timesteps: Array = np.concatenate([self._prk, plms]).astype(np.int64)
        if self.timesteps.max() >= len(self._alphas):
            raise ConfigurationError(
                f"With {steps} steps and its steps_offset, PNDM starts at timestep {self.timesteps.max()}, but the "
                f"model was trained up to {len(self._alphas) - 1}. Use fewer steps."
            )
        self.warm_up = len(self.timesteps) - steps
        self._predictions: list[Array] = []  # the latest first
        self._sum: Array | float = 0.0
        self._before: Array | None = None

    def model_input(self, latents: Array, step: int) -> Array:
        """Return the denoiser's input for `latents` at the call `step`."""
        return latents

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """Return the latents after the call `step`, given the denoiser's `prediction`; calls must be in order."""
        if step < len(self._prk):
            return self._runge_kutta(prediction, step, latents)
        return self._multistep(prediction, step, latents)

    def _runge_kutta(self, prediction: Array, call: int, latents: Array) -> Array:
        """Make one of the four calls of a step, all of which start at the latents of the first."""
        stage = call % 4
        if stage == 0:
            self._predictions = [prediction, *self._predictions[:3]]
            self._before = latents
        self._sum = self._sum + _RUNGE_KUTTA[stage] * prediction
        direction = prediction
        if stage == 3:
            direction, self._sum = np.asarray(self._sum), 0.0
        assert self._before is not None
        after = int(self.timesteps[call]) - (0 if call % 2 else self._stride // 2)
        return self._moved(self._before, int(self._prk[call // 4 * 4]), after, direction)

    def _multistep(self, prediction: Array, call: int, latents: Array) -> Array:
        timestep = int(self.timesteps[call])
        if call == 1:  # without Runge-Kutta, the first step is repeated with the mean of both predictions
            assert self._before is not None
            mean = (prediction + self._predictions[0]) / 2
            return self._moved(self._before, timestep + self._stride, timestep, mean)
        self._predictions = [prediction, *self._predictions[:3]]
        if call == 0:
            self._before = latents
        weights = _WEIGHTS[len(self._predictions) - 1]
        direction = sum(weight * each for weight, each in zip(weights, self._predictions, strict=True))
        return self._moved(latents, timestep, timestep - self._stride, np.asarray(direction))

    def _moved(self, latents: Array, timestep: int, after: int, prediction: Array) -> Array:
        """Move `latents` from `timestep` to `after` (equation 9 of the paper)."""
        alpha, alpha_after = self._alpha(timestep), self._alpha(after)
        if self._config["prediction_type"] == "v_prediction":
            prediction = alpha**0.5 * prediction + (1 - alpha) ** 0.5 * latents
        divisor = alpha * (1 - alpha_after) ** 0.5 + (alpha * (1 - alpha) * alpha_after) ** 0.5
        moved: Array = (alpha_after / alpha) ** 0.5 * latents - (alpha_after - alpha) / divisor * prediction
        return moved

    def _alpha(self, timestep: int) -> float:
        if timestep < 0:
            return 1.0 if self._config["set_alpha_to_one"] else float(self._alphas[0])
        return float(self._alphas[timestep])

    def _spaced(self, steps: int) -> Array:
        """Return the timesteps of the steps, ascending."""
        trained, spacing = int(self._config["num_train_timesteps"]), self._config["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, trained - 1, steps).round().astype(np.int64)
        if spacing == "leading":
            return np.arange(steps) * self._stride + int(self._config["steps_offset"])
        return np.round(np.arange(trained, 0, -trained / steps))[::-1].astype(np.int64) - 1
