"""What a scheduler's configuration says, checked against what is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tgate_compile._errors import ConfigurationError

MSG_VALUE = (
    "{scheduler} with {key}={given!r} is not in this runtime, which has {known} there. Export the bundle from a "
    "pipeline with a scheduler of that kind, or run it with another: {names}."
)

#: All of these schedulers have them. The values are diffusers' defaults, for keys that a configuration leaves out.
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

#: By the names that `scheduler=` takes; the classes in diffusers.
NAMES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}


def checked_config(
    scheduler: str, given: Mapping[str, Any], defaults: Mapping[str, Any], choices: Mapping[str, Sequence[object]]
) -> dict[str, Any]:
    """All of `defaults`' keys, with the values that `given` has for them.

    Keys of `given` beyond these are those of other schedulers, which diffusers keeps in a configuration, too.

    Args:
        scheduler: the class, for the message.
        given: a scheduler's configuration, of this class or of another.
        defaults: what a configuration may leave out.
        choices: for some keys, the only values that there is an implementation for.

    Raises:
        ConfigurationError: a value is none of the choices.
    """
    config = {key: given.get(key, default) for key, default in defaults.items()}
    for key, known in choices.items():
        if config[key] not in known:
            raise ConfigurationError(
                MSG_VALUE.format(
                    scheduler=scheduler,
                    key=key,
                    given=config[key],
                    known=" and ".join(map(repr, known)),
                    names=", ".join(NAMES),
                )
            )
    return config
