"""Choose a noise scheduler, from the manifest or by name."""

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
    """The scheduler of one generation, whose methods are called for each denoiser call in order.

    There is one call for each of `timesteps`. The first `warm_up` calls are additional and belong to the first step.
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
    """Return the scheduler `name`, or that of the bundle if it is None, for a generation of `steps` steps.

    It has the bundle's configuration. Settings that are missing there because the class is another one have the
    defaults of the class, as with diffusers' `from_config`.

    Raises:
        ConfigurationError: the name, the class, the configuration or the number of steps is not supported.
    """
    if name is not None and name not in NAMES:
        raise ConfigurationError(
            f"scheduler must be one of {', '.join(map(repr, NAMES))}, or None for the bundle's own, but got {name!r}."
        )
    class_name = spec.class_name if name is None else NAMES[name]
    if class_name not in _CLASSES:
        names = " or ".join(map(repr, NAMES))
        raise ConfigurationError(
            f"The bundle's scheduler is a {class_name}, which this runtime does not support. It supports "
            f"{', '.join(_CLASSES)}; choose one of these with scheduler={names}."
        )
    most = spec.config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or not 1 <= steps.__index__() <= most:
        raise ConfigurationError(f"num_inference_steps must be an integer from 1 to {most}, but got {steps!r}.")
    return _CLASSES[class_name](spec.config, steps.__index__())
