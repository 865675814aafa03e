"""Modular pipelines: what `optimize` needs to know of a `diffusers.ModularPipeline`, and of its guider.

A modular pipeline is a tree of blocks over named components. Its call takes what its blocks ask for, and nothing in it
says whether guidance is on: the component `guider` decides that anew at every timestep. The guider's predictions come
in denoiser calls of their own, the conditional one first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.families import Family, family_of
from tgate_compile.methods.method import Half

#: The guidance halves by the names that guiders give to their predictions, in the order of the calls.
_PREDICTIONS: dict[str, Half] = {"pred_cond": "cond", "pred_uncond": "uncond"}

#: Models whose blocks denoise a video part by part, each in a loop over the timesteps of its own.
_IN_PARTS = frozenset({"helios", "helios-pyramid", "wan-animate-2", "wan-animate-2-distilled"})

#: Of an image, of tokens, of a video.
_PREDICTION_SHAPES = ((1, 4, 16, 16), (1, 16, 8), (1, 4, 2, 16, 16))

MSG_NOT_BY_GUIDER = (
    "The {name} of this {pipeline} was called, but not for a prediction of the guider's: these begin with "
    "guider.set_state() and guider.prepare_models(), as in diffusers' own blocks. "
    "One of the pipeline's blocks calls the {name} by itself. "
    "What works instead: the pipeline without that block, or without tgate_compile."
)


def is_modular(pipe: object) -> bool:
    """Whether `pipe` is a modular pipeline."""
    return isinstance(pipe, ModularPipeline)


def check_ordinary(pipe: object, function: str) -> None:
    """Raise ConfigurationError for a modular pipeline, which `function` cannot take."""
    if is_modular(pipe):
        raise ConfigurationError(
            f"{function} needs an ordinary diffusers pipeline, whose call takes `guidance_scale` and `output_type` "
            f"and returns images, but got a {type(pipe).__name__}, which is modular. Use an ordinary pipeline with "
            "the same components; a schedule found with it can be given to optimize(pipe, schedule=...) here."
        )


def family_of_pipeline(pipe: object) -> Family:
    """The facts about `pipe`: those of its class or, for a modular pipeline, those of its components.

    A modular pipeline's class says little: blocks of Wan 2.2 may run in a `WanModularPipeline`.
    """
    if not is_modular(pipe):
        return family_of(type(pipe))
    second = "transformer_2" if "transformer_2" in pipe.component_names else None  # type: ignore[attr-defined]
    return Family(calls=tuple(_PREDICTIONS.values()), only="cond", second=second, boundary="boundary_ratio")


def check_loaded(pipe: Any) -> None:
    """Check that a modular pipeline has the models and the settings that its denoising loop is made of.

    Raises:
        ConfigurationError: some are not loaded yet.
    """
    parts = ("unet", "transformer", "transformer_2", "scheduler", "guider", "guider_2")
    missing = [name for name in parts if name in pipe.component_names and getattr(pipe, name) is None]
    if missing:
        raise ConfigurationError(
            f"The components {', '.join(missing)} of this {type(pipe).__name__} are not loaded yet. Call "
            "pipe.load_components() first, or give them by pipe.update_components(...)."
        )


def check_guidance(pipe: Any, denoisers: Iterable[str]) -> None:
    """Check that the `denoisers` of a modular pipeline run under guiders whose two halves can become one.

    Raises:
        UnsupportedModelError: they do not.
    """
    pipeline = type(pipe).__name__
    if getattr(pipe._blocks, "model_name", None) in _IN_PARTS:
        raise UnsupportedModelError(
            f"{pipeline} cannot be gated: it denoises a video part by part, each part in a pass over the timesteps "
            "of its own, and a generation is one pass. What works instead: the pipeline without tgate_compile."
        )
    if "scheduler" not in pipe.component_names:
        raise UnsupportedModelError(
            f"{pipeline} cannot be gated: its blocks have no scheduler, whose timesteps are the steps to count."
        )
    for name in denoisers:
        guider = getattr(pipe, guider_name(pipe, name), None)
        if not isinstance(guider, BaseGuidance):
            raise UnsupportedModelError(
                f"{pipeline} cannot be gated: its blocks use no guider, so that nothing says whether guidance is on "
                "and which denoiser call belongs to which half. What works instead: the pipeline without "
                "tgate_compile, or an ordinary pipeline for the same model."
            )
        reason = refusal(guider)
        if reason is not None:
            raise UnsupportedModelError(
                f"{pipeline} cannot be gated with the guider {type(guider).__name__}: {reason}. What works "
                "instead: pipe.update_components(guider=ClassifierFreeGuidance(...)), or the pipeline without "
                "tgate_compile."
            )


def guider_name(pipe: Any, denoiser: str) -> str:
    """The component that guides `denoiser`: Wan 2.2 has a guider for each of its two."""
    _, underscore, number = denoiser.partition("_")
    own = f"guider{underscore}{number}"
    return own if own in pipe.component_names else "guider"


def refusal(guider: BaseGuidance) -> str | None:
    """Why a denoiser under `guider` cannot be gated; None if nothing speaks against it.

    After the gate there is one prediction, which the guider gets for both. So it must need no more than two, of the
    same model for different conditions, and must make of two equal predictions that prediction.
    """
    predictions = list(guider._input_predictions)
    if predictions != list(_PREDICTIONS):
        return f"it combines the predictions {', '.join(predictions)}, and the gate knows {' and '.join(_PREDICTIONS)}"
    for method in ("prepare_models", "cleanup_models"):
        if getattr(type(guider), method) is not getattr(BaseGuidance, method):
            return (
                "it changes the denoiser for one of its predictions (prepare_models), so that the two halves are "
                "predictions of different models"
            )
    failure: Exception | None = None
    for shape in _PREDICTION_SHAPES:  # MagnitudeAwareGuidance, for one, takes tokens only
        try:
            return _tried(copy.deepcopy(guider), shape)
        except Exception as error:  # a guider is anybody's code
            failure = error
    return f"trying it on two predictions failed ({type(failure).__name__}: {failure})"


def _tried(guider: BaseGuidance, shape: tuple[int, ...]) -> str | None:
    """Try `guider`, a copy, with guidance on: which conditions come first, and what becomes of equal predictions."""
    guider.enable()
    guider.set_state(step=0, num_inference_steps=None, timestep=torch.zeros(()))  # no number of steps: always on
    conditions = [batch.condition for batch in guider.prepare_inputs({"condition": ("cond", "uncond")})]
    if conditions not in (["cond", "uncond"], ["cond"]):
        return f"its denoiser calls are for the conditions {', '.join(conditions)}, and not for cond, then uncond"
    random = torch.Generator().manual_seed(0)
    cond, uncond, later = (torch.randn(shape, generator=random) for _ in range(3))
    guider.forward(pred_cond=cond, pred_uncond=uncond)
    guider.set_state(step=10**6, num_inference_steps=None, timestep=torch.zeros(()))  # after any step that it counts to
    result = guider.forward(pred_cond=later, pred_uncond=later)[0]
    if torch.allclose(result, later, rtol=1e-3, atol=1e-3):
        return None
    return (
        "what it makes of two equal predictions is not that prediction, so that it would go on guiding after the gate. "
        "A momentum does so: set adaptive_projected_guidance_momentum to None"
    )


class Guidance:
    """Whether guidance is on in a generation of a modular pipeline: its guiders' own word.

    Made when the generation begins. Called with the denoiser's name, once at each of its calls.

    Raises:
        ConfigurationError: a component is not there.
        UnsupportedModelError: a guider cannot be gated, also when it has been exchanged on the way; or the denoiser is
            called in another way than a guider's predictions are.
    """

    def __init__(self, pipe: Any, denoisers: tuple[str, ...]) -> None:
        self._pipe = pipe
        self._guiders = self._checked(denoisers)
        self._running = self._guiders[denoisers[0]]
        self._last: dict[str, tuple[int, int]] = {}

    def _checked(self, denoisers: tuple[str, ...]) -> dict[str, BaseGuidance]:
        check_loaded(self._pipe)
        check_guidance(self._pipe, denoisers)
        return {name: getattr(self._pipe, guider_name(self._pipe, name)) for name in denoisers}

    def __call__(self, denoiser: str) -> bool:
        guider = getattr(self._pipe, guider_name(self._pipe, denoiser))
        if guider is not self._guiders[denoiser]:
            self._guiders |= self._checked((denoiser,))
        self._running = guider
        self._follow(denoiser, guider)
        return bool(guider.num_conditions > 1)

    def at(self, denoiser: str, timestep: int) -> bool:
        """Whether it will be on at the timestep of this index, counted from the first one of the denoiser."""
        guider = copy.deepcopy(self._guiders[denoiser])
        guider._step = timestep + self._timesteps_before(denoiser)
        guider._num_inference_steps = self._running._num_inference_steps
        return bool(guider.num_conditions > 1)

    def _timesteps_before(self, denoiser: str) -> int:
        """How many timesteps of the loop belong to another denoiser, before this one takes over."""
        if denoiser == next(iter(self._guiders)):
            return 0
        scheduler = self._pipe.scheduler
        boundary = self._pipe.config.boundary_ratio * scheduler.config.num_train_timesteps
        return int((scheduler.timesteps >= boundary).sum())

    def num_timesteps(self) -> int | None:
        """How many of the scheduler's timesteps the loop visits, once it has begun; None for all."""
        guider, scheduler = self._running, self._pipe.scheduler
        steps, order, total = guider._num_inference_steps, scheduler.order, len(scheduler.timesteps)
        requested = getattr(scheduler, "num_inference_steps", None) or -(-total // order)
        warmup = max(total - requested * order, 0)
        rest = total - (getattr(scheduler, "begin_index", None) or 0)
        if -(-(rest - warmup) // order) == steps:
            return rest
        # The loop ends early: its number of steps then counts timesteps, also where a step has two.
        return min(int(steps) + warmup, rest) if order == 1 else min(int(steps), rest)

    def _follow(self, denoiser: str, guider: BaseGuidance) -> None:
        """Check that this call is the next prediction of the guider, or the first one of a later timestep."""
        at, last = (guider._step, guider._count_prepared), self._last.get(denoiser)
        told = {"name": denoiser, "pipeline": type(self._pipe).__name__}
        if last is not None and at[0] is not None and at[0] < last[0]:
            last = None  # a new pass over the timesteps
        expected = last[1] + 1 if last is not None and at[0] == last[0] else 1
        if at[0] is None or at[1] != expected or expected > guider.num_conditions:
            raise UnsupportedModelError(MSG_NOT_BY_GUIDER.format(**told))
        self._last[denoiser] = at


def has_own_blocks(pipe: Any) -> bool:
    """Whether a modular pipeline has blocks that are not diffusers' own: these may do anything to the denoiser."""
    return any(not type(block).__module__.startswith("diffusers.") for block in _blocks(pipe._blocks))


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for part in block.sub_blocks.values():
        yield from _blocks(part)
