"""The noise levels and configurations that all schedulers share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_compile._errors import ConfigurationError

#: An array whose dtype is given in the docstring.
Array = NDArray[Any]

#: Replaces the last of the cumulative products if zero terminal SNR makes it 0: its sigma would be infinite.
NEARLY_ZERO = 2.0**-24


def cumulative_alphas(config: Mapping[str, Any]) -> Array:
    """Return the cumulative products of `1 - beta` for each training timestep, float32, [num_train_timesteps].

    Intermediate values are rounded to float32 where diffusers does it, so that results agree.
    """
    betas = _betas(config)
    if config["rescale_betas_zero_snr"]:
        betas = _with_zero_terminal_snr(betas)
    return _products(betas)


def sigmas_of(alphas: Array) -> Array:
    """Return the noise's standard deviation relative to the signal, float32, [num_train_timesteps], ascending."""
    sigmas: Array = ((1 - alphas) / alphas) ** 0.5
    return sigmas


def karras_sigmas(largest: float, smallest: float, count: int) -> Array:
    """Return `count` descending sigmas, most of them small (arXiv 2206.00364, equation 5, with rho 7)."""
    ramp = np.linspace(0, 1, count)
    first, last = largest ** (1 / 7), smallest ** (1 / 7)
    sigmas: Array = (first + ramp * (last - first)) ** 7
    return sigmas


def timesteps_of(sigmas: Array, training: Array) -> Array:
    """Return the timesteps, with fractions, at which the interpolated sigmas in `training` equal `sigmas`."""
    logs, targets = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, targets, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[low] - targets) / (logs[low] - logs[low + 1]), 0, 1)
    timesteps: Array = (1 - weight) * low + weight * (low + 1)
    return timesteps


def _betas(config: Mapping[str, Any]) -> Array:
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], dtype=np.float32)
    if config["beta_schedule"] == "squaredcos_cap_v2":
        levels = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.asarray([min(1 - after / level, 0.999) for level, after in itertools.pairwise(levels)], "f4")
    if config["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2
    return np.linspace(start, end, count, dtype=np.float32)


def _with_zero_terminal_snr(betas: Array) -> Array:
    """Rescale `betas` to zero terminal SNR (arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(_products(betas))
    first, last = roots[0].copy(), roots[-1].copy()
    products = ((roots - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([products[:1], products[1:] / products[:-1]])


def _products(betas: Array) -> Array:
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


#: The settings that all schedulers have, with diffusers' defaults for keys that a configuration omits.
COMMON: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
COMMON_CHOICES: Mapping[str, Sequence[object]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}

#: The values of `scheduler=`, with the names of the classes in diffusers.
NAMES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}


def checked_config(
    scheduler: str, given: Mapping[str, Any], defaults: Mapping[str, Any], choices: Mapping[str, Sequence[object]]
) -> dict[str, Any]:
    """Return `defaults`, updated by the values of the same keys in `given`.

    Other keys in `given` are ignored: diffusers also keeps the settings of other schedulers in a configuration.

    Args:
        scheduler: the name of the class, for the error message.
        given: the configuration of a scheduler, of this class or of another.
        defaults: all settings of the scheduler, with their defaults.
        choices: for some keys, the supported values.

    Raises:
        ConfigurationError: a value is not supported.
    """
    config = {key: given.get(key, default) for key, default in defaults.items()}
    for key, known in choices.items():
        if config[key] not in known:
            raise ConfigurationError(
                f"This runtime does not support {scheduler} with {key}={config[key]!r}, only with "
                f"{' and '.join(map(repr, known))}. Export the bundle from a pipeline with a supported scheduler, or "
                f"choose another with scheduler=: {', '.join(NAMES)}."
            )
    return config
