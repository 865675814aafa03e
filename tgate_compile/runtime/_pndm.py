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
#: How many predictions a linear multistep combines: the weights of the last ones, the latest first.
_WEIGHTS: Sequence[Sequence[float]] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class Pndm:
    """`PNDMScheduler` of diffusers, for a generation of `steps` steps.

    It makes more denoiser calls than steps: one more with `skip_prk_steps`, else nine more.

    Attributes:
        timesteps: what the denoiser is told at each call, int64, [calls].
        initial_sigma: what normal noise is multiplied by to begin with.
        warm_up: calls beyond the steps, which come first.
    """

    initial_sigma = 1.0

    def __init__(self, given: Mapping[str, Any], steps: int) -> None:
        """Raises ConfigurationError for a configuration that is not written here."""
        self._config = checked_config("PNDMScheduler", given, DEFAULTS, CHOICES)
        # Another scheduler's option, which this one has not.
        self._alphas = cumulative_alphas({**self._config, "rescale_betas_zero_snr": False})
        self._stride = int(self._config["num_train_timesteps"]) // steps
        spaced = self._spaced(steps)
        if self._config["skip_prk_steps"]:
            self._prk = np.empty(0, dtype=np.int64)
            plms = np.concatenate([spaced[:-1], spaced[-2:-1], spaced[-1:]])[::-1]
        else:
            if steps < 4:
                raise ConfigurationError(
                    "PNDM begins with Runge-Kutta steps, which take 4 steps or more, but num_inference_steps is "
                    f"{steps}. Take more, or export the bundle with a scheduler that has skip_prk_steps=True."
                )
            between = spaced[-4:].repeat(2) + np.tile([0, self._stride // 2], 4)
            self._prk = between[:-1].repeat(2)[1:-1][::-1]
            plms = spaced[:-3][::-1]
        self.timesteps: Array = np.concatenate([self._prk, plms]).astype(np.int64)
        if self.timesteps.max() >= len(self._alphas):
            raise ConfigurationError(
                f"With {steps} steps and its steps_offset, PNDM begins at timestep {self.timesteps.max()}, and "
                f"the model was trained up to {len(self._alphas) - 1}. Take fewer steps."
            )
        self.warm_up = len(self.timesteps) - steps
        self._predictions: list[Array] = []  # the latest first
        self._sum: Array | float = 0.0
        self._before: Array | None = None

    def model_input(self, latents: Array, step: int) -> Array:
        """What the denoiser sees of `latents` at the call `step`."""
        return latents

    def step(self, prediction: Array, step: int, latents: Array) -> Array:
        """The latents after the call `step`, from the denoiser's `prediction`; calls come in order."""
        if step < len(self._prk):
            return self._runge_kutta(prediction, step, latents)
        return self._multistep(prediction, step, latents)

    def _runge_kutta(self, prediction: Array, call: int, latents: Array) -> Array:
        """One of the four calls of a step, all of which start at the latents of the first."""
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
        if call == 1:  # without Runge-Kutta: the first step once more, with the mean of both predictions
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
        """From `timestep` to `after`: formula 9 of the paper."""
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
        """The steps' timesteps, growing."""
        trained, spacing = int(self._config["num_train_timesteps"]), self._config["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, trained - 1, steps).round().astype(np.int64)
        if spacing == "leading":
            return np.arange(steps) * self._stride + int(self._config["steps_offset"])
        return np.round(np.arange(trained, 0, -trained / steps))[::-1].astype(np.int64) - 1
