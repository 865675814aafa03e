"""The arguments of `tune`, `analyze` and `evaluate`, checked, and the setting in which they were measured."""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from tgate_compile import __version__
from tgate_compile._errors import ConfigurationError, check_names
from tgate_compile.methods.schedule import Schedule

MSG_PROMPTS = (
    'prompts must be a sequence of strings, such as ["a red fox in snow", "a harbour at night"], or None with '
    'call={{"prompt_embeds": ..., ...}}, but got {given!r}.'
)
MSG_SEEDS = "seeds must be one or more distinct integers, such as (0, 1), but got {given!r}."
MSG_CANDIDATES = "candidates must be a sequence of tgate_compile.Schedule, or None for the defaults, but got {given!r}."
MSG_RESERVED = "call must not contain {names}, because {verb}() sets {names} itself."

_OWN = ("num_inference_steps", "generator", "output_type", "return_dict")


@dataclass(frozen=True)
class Runs:
    """The generations that are repeated for each compared schedule.

    Attributes:
        prompts: prompts; None if `call` contains prompt embeddings or other inputs.
        num_inference_steps: passed to the pipeline's call.
        seeds: seeds of the noise for each prompt.
        call: further arguments of the pipeline's call.
        verb: name of the function that the user called, for messages.
    """

    prompts: Sequence[str] | None
    num_inference_steps: int
    seeds: Sequence[int]
    call: Mapping[str, Any]
    verb: str

    def __post_init__(self) -> None:
        if self.prompts is not None:
            _check_sequence(self.prompts, str, MSG_PROMPTS)
            if isinstance(self.prompts, str) or not all(prompt.strip() for prompt in self.prompts):
                raise ConfigurationError(MSG_PROMPTS.format(given=self.prompts))
        if not isinstance(self.call, Mapping):
            raise ConfigurationError(
                f"call must be a mapping of further arguments for the pipeline's call, but got {self.call!r}."
            )
        if self.prompts is None and not self.call:
            raise ConfigurationError(MSG_PROMPTS.format(given=None))
        if not is_whole(self.num_inference_steps) or self.num_inference_steps < 2:
            raise ConfigurationError(
                f"num_inference_steps must be an integer of at least 2, but got {self.num_inference_steps!r}."
            )
        _check_sequence(self.seeds, int, MSG_SEEDS)
        if not all(map(is_whole, self.seeds)) or len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(MSG_SEEDS.format(given=self.seeds))

    def calls(self, pipe: DiffusionPipeline) -> list[dict[str, Any]]:
        """Return the arguments of the pipeline's call for each prompt.

        Raises:
            ConfigurationError: the pipeline does not take these arguments.
        """
        parameters = inspect.signature(type(pipe).__call__).parameters
        pipeline = type(pipe).__name__
        needed = (*_OWN, "prompt") if self.prompts is not None else _OWN
        missing = [name for name in needed if name not in parameters]
        if missing:
            raise ConfigurationError(
                f"{self.verb}() needs a pipeline whose call takes {' and '.join(missing)}, but {pipeline}'s does not."
            )
        reserved = [name for name in self.call if name in needed]
        if reserved:
            raise ConfigurationError(MSG_RESERVED.format(names=", ".join(reserved), verb=self.verb))
        # Even if the call has **kwargs, which diffusers uses for deprecated names.
        known = [name for name in parameters if name not in ("self", *needed)]
        check_names(self.call, known, f"call: the call of {pipeline}")
        shared = {**self.call, "num_inference_steps": self.num_inference_steps}
        return [{**shared, "prompt": prompt} for prompt in self.prompts] if self.prompts is not None else [shared]

    def described_call(self) -> dict[str, str]:
        """Return the further arguments as text."""
        return {name: _as_text(value) for name, value in self.call.items()}


@dataclass(frozen=True)
class Request(Runs):
    """The arguments of `tune`; see there."""

    tolerance: float
    candidates: Sequence[Schedule] | None
    budget: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.budget
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1
        ):
            raise ConfigurationError(
                f"budget must be a number between 0 and 1 (0.5: half of the plain pipeline's operations), but got "
                f"{budget!r}."
            )
        tolerance = self.tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
            raise ConfigurationError(
                f"tolerance must be a number greater than 0 (0.1: ten percent of the norm of the latents), but got "
                f"{tolerance!r}."
            )
        if self.candidates is not None:
            _check_sequence(self.candidates, Schedule, MSG_CANDIDATES)


def _check_sequence(given: object, kind: type, message: str) -> None:
    if not isinstance(given, Sequence) or not given or not all(isinstance(item, kind) for item in given):
        raise ConfigurationError(message.format(given=given))


def is_whole(given: object) -> bool:
    """Return whether `given` is an int but not a bool."""
    return isinstance(given, int) and not isinstance(given, bool)


def _as_text(value: object) -> str:
    if torch.is_tensor(value):
        return f"Tensor{list(value.shape)}"
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def setting_of(pipe: DiffusionPipeline, denoisers: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Return the classes, device, dtype and versions of a measurement as plain data."""
    weights = (tensor for denoiser in denoisers.values() for tensor in denoiser.parameters())
    weight = next((tensor for tensor in weights if tensor.is_floating_point()), None)
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": ", ".join(type(denoiser).__name__ for denoiser in denoisers.values()),
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(weight.device if weight is not None else "cpu"),
        "dtype": str(weight.dtype if weight is not None else torch.float32).removeprefix("torch."),
        "tgate_compile": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
