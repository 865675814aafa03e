"""Noise schedulers, chosen by the manifest or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tgate_compile._errors import ConfigurationError
from tgate_compile.bundle.manifest import Scheduler as SchedulerSpec
from tgate_compile.runtime._ddim import Ddim
from tgate_compile.runtime._dpm_plus_plus import DpmPlusPlus
from tgate_compile.runtime._euler import Euler
from tgate_compile.runtime._noise import NAMES, Array
from tgate_compile.runtime._pndm import Pndm


class Scheduler(Protocol):
    """A scheduler of one generation: its methods are called for each denoiser call in order.

    There is a call for each of `timesteps`. The first `warm_up` ones come on top of the steps, and belong to the first.
    """

    timesteps: Any
    initial_sigma: float
    warm_up: int

    def model_input(self, latents: Array, step: int) -> Array: ...

    def step(self, prediction: Array, step: int, latents: Array) -> Array: ...


_CLASSES: Mapping[str, Callable[[Mapping[str, Any], int], Scheduler]] = {
    "DDIMScheduler": Ddim,
    "EulerDiscreteScheduler": Euler,
    "DPMSolverMultistepScheduler": DpmPlusPlus,
    "PNDMScheduler": Pndm,
}


def make_scheduler(spec: SchedulerSpec, name: str | None, steps: int) -> Scheduler:
    """The scheduler `name`, or (None) that of the bundle, with the bundle's configuration, for so many steps.

    What that leaves out for a scheduler of another class are the class's own defaults, as in diffusers' `from_config`.

    Raises:
        ConfigurationError: there is none here of that name, of that class or with that configuration.
    """
    if name is not None and name not in NAMES:
        raise ConfigurationError(
            f"scheduler must be one of {', '.join(map(repr, NAMES))}, or None for the bundle's own, but got {name!r}."
        )
    wanted = spec.class_name if name is None else NAMES[name]
    if wanted not in _CLASSES:
        names = " or ".join(map(repr, NAMES))
        raise ConfigurationError(
            f"The bundle's scheduler is a {wanted}, which is not in this runtime. It has {', '.join(_CLASSES)}; ask "
            f"for one of them by scheduler={names}."
        )
    most = spec.config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or not 1 <= steps.__index__() <= most:
        raise ConfigurationError(f"num_inference_steps must be a whole number from 1 to {most}, but got {steps!r}.")
    return _CLASSES[wanted](spec.config, steps.__index__())
