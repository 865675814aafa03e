"""Support for modular pipelines (`diffusers.ModularPipeline`) and their guiders.

A modular pipeline is a tree of blocks over named components. Its call takes the inputs of its blocks, and does not show
whether guidance is on: the component `guider` decides that at every timestep. Each of the guider's predictions is a
separate denoiser call, the conditional one first.
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

#: The guidance halves by the guiders' names for their predictions, in the order of the calls.
_PREDICTIONS: dict[str, Half] = {"pred_cond": "cond", "pred_uncond": "uncond"}

#: Models whose blocks denoise a video part by part, with a separate loop over the timesteps for each part.
_IN_PARTS = frozenset({"helios", "helios-pyramid", "wan-animate-2", "wan-animate-2-distilled"})

#: Shapes of predictions for an image, for tokens and for a video.
_PREDICTION_SHAPES = ((1, 4, 16, 16), (1, 16, 8), (1, 4, 2, 16, 16))

MSG_NOT_BY_GUIDER = (
    "The {name} of this {pipeline} was called, but not for a prediction of the guider, which begins with "
    "guider.set_state() and guider.prepare_models() in diffusers' own blocks. One of the pipeline's blocks calls the "
    "{name} directly. What works instead: the pipeline without that block, or without tgate_compile."
)


def is_modular(pipe: object) -> bool:
    """Return whether `pipe` is a modular pipeline."""
    return isinstance(pipe, ModularPipeline)


def check_ordinary(pipe: object, function: str) -> None:
    """Raise ConfigurationError if `pipe` is a modular pipeline, which `function` does not support."""
    if is_modular(pipe):
        raise ConfigurationError(
            f"{function} needs an ordinary diffusers pipeline, whose call takes `guidance_scale` and `output_type` "
            f"and returns images, but got a {type(pipe).__name__}, which is modular. Use an ordinary pipeline with "
            "the same components, and pass a schedule found with it to optimize(pipe, schedule=...) here."
        )


def family_of_pipeline(pipe: object) -> Family:
    """Return the properties of the class of `pipe` or, for a modular pipeline, of its components.

    The class of a modular pipeline determines little: blocks of Wan 2.2 may run in a `WanModularPipeline`.
    """
    if not is_modular(pipe):
        return family_of(type(pipe))
    second = "transformer_2" if "transformer_2" in pipe.component_names else None  # type: ignore[attr-defined]
    return Family(calls=tuple(_PREDICTIONS.values()), only="cond", second=second, boundary="boundary_ratio")


def check_loaded(pipe: Any) -> None:
    """Check that a modular pipeline has loaded the components of its denoising loop.

    Raises:
        ConfigurationError: some are not loaded yet.
    """
    parts = ("unet", "transformer", "transformer_2", "scheduler", "guider", "guider_2")
    missing = [name for name in parts if name in pipe.component_names and getattr(pipe, name) is None]
    if missing:
        raise ConfigurationError(
            f"The components {', '.join(missing)} of this {type(pipe).__name__} are not loaded yet. Call "
            "pipe.load_components() first, or set them with pipe.update_components(...)."
        )


def check_guidance(pipe: Any, denoisers: Iterable[str]) -> None:
    """Check that the guiders of a modular pipeline's `denoisers` can be gated.

    Raises:
        UnsupportedModelError: one of them cannot.
    """
    pipeline = type(pipe).__name__
    if getattr(pipe._blocks, "model_name", None) in _IN_PARTS:
        raise UnsupportedModelError(
            f"{pipeline} cannot be gated: it denoises a video part by part, with a separate pass over the timesteps "
            "for each part, but a generation is one pass. What works instead: the pipeline without tgate_compile."
        )
    if "scheduler" not in pipe.component_names:
        raise UnsupportedModelError(
            f"{pipeline} cannot be gated: its blocks have no scheduler, whose timesteps define the steps."
        )
    for name in denoisers:
        guider = getattr(pipe, guider_name(pipe, name), None)
        if not isinstance(guider, BaseGuidance):
            raise UnsupportedModelError(
                f"{pipeline} cannot be gated: its blocks use no guider, so it is not known whether guidance is on and "
                "which denoiser call belongs to which half. What works instead: the pipeline without tgate_compile, "
                "or an ordinary pipeline for the same model."
            )
        check_guider(guider, pipeline)


def check_guider(guider: BaseGuidance, pipeline: str) -> None:
    """Check that a denoiser with this `guider` can be gated.

    Raises:
        UnsupportedModelError: it cannot.
    """
    reason = refusal(guider)
    if reason is not None:
        raise UnsupportedModelError(
            f"{pipeline} cannot be gated with the guider {type(guider).__name__}: {reason}. What works instead: "
            "pipe.update_components(guider=ClassifierFreeGuidance(...)), or the pipeline without tgate_compile."
        )


def copied_guiders(pipe: object) -> dict[str, BaseGuidance]:
    """Return copies of the guiders of `pipe`, by attribute: they keep the step and the predictions of a call."""
    return {name: copy.deepcopy(value) for name, value in vars(pipe).items() if isinstance(value, BaseGuidance)}


def guider_name(pipe: Any, denoiser: str) -> str:
    """Return the name of the guider of `denoiser`; Wan 2.2 has one for each of its two denoisers."""
    _, underscore, number = denoiser.partition("_")
    own = f"guider{underscore}{number}"
    return own if own in pipe.component_names else "guider"


def refusal(guider: BaseGuidance) -> str | None:
    """Return why a denoiser with this `guider` cannot be gated; None if it can.

    After the gate there is one prediction, which the guider gets as both of its predictions. So the guider must use
    exactly two, from the same model with different conditions, and must combine two equal predictions into the same
    prediction.
    """
    predictions = list(guider._input_predictions)
    if predictions != list(_PREDICTIONS):
        expected = " and ".join(_PREDICTIONS)
        return f"it combines the predictions {', '.join(predictions)}, but the gate supports only {expected}"
    for method in ("prepare_models", "cleanup_models"):
        if getattr(type(guider), method) is not getattr(BaseGuidance, method):
            return (
                "it changes the denoiser for one of its predictions (prepare_models), so the two halves are "
                "predictions of different models"
            )
    failure: Exception | None = None
    for shape in _PREDICTION_SHAPES:  # MagnitudeAwareGuidance, for example, takes tokens only
        try:
            return _tried(copy.deepcopy(guider), shape)
        except Exception as error:  # a guider may be user code
            failure = error
    return f"trying it on two predictions failed ({type(failure).__name__}: {failure})"


def _tried(guider: BaseGuidance, shape: tuple[int, ...]) -> str | None:
    """Test `guider`, a copy, with guidance on: the order of its calls, and its result for two equal predictions."""
    guider.enable()
    guider.set_state(step=0, num_inference_steps=None, timestep=torch.zeros(()))  # no number of steps: always on
    conditions = [batch.condition for batch in guider.prepare_inputs({"condition": ("cond", "uncond")})]
    if conditions not in (["cond", "uncond"], ["cond"]):
        return f"its denoiser calls are for the conditions {', '.join(conditions)}, not for cond and then uncond"
    random = torch.Generator().manual_seed(0)
    cond, uncond, later = (torch.randn(shape, generator=random) for _ in range(3))
    guider.forward(pred_cond=cond, pred_uncond=uncond)
    guider.set_state(step=10**6, num_inference_steps=None, timestep=torch.zeros(()))  # beyond any step it may count to
    result = guider.forward(pred_cond=later, pred_uncond=later)[0]
    if torch.allclose(result, later, rtol=1e-3, atol=1e-3):
        return None
    return (
        "its result for two equal predictions is not that prediction, so it would continue to guide after the gate. "
        "Momentum has this effect: set adaptive_projected_guidance_momentum to None"
    )


class Guidance:
    """Reports whether guidance is on in a generation of a modular pipeline, according to its guiders.

    It is created when the generation begins, and called with the denoiser's name once for each denoiser call.

    Raises:
        ConfigurationError: a component is not loaded.
        UnsupportedModelError: a guider cannot be gated, including one that was exchanged during the generation, or a
            denoiser call is not one of a guider's predictions.
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
        """Return whether guidance will be on at the timestep with this index, counted from the denoiser's first."""
        guider = copy.deepcopy(self._guiders[denoiser])
        guider._step = timestep + self._timesteps_before(denoiser)
        guider._num_inference_steps = self._running._num_inference_steps
        return bool(guider.num_conditions > 1)

    def _timesteps_before(self, denoiser: str) -> int:
        """Return the number of the loop's timesteps before this denoiser takes over from another."""
        if denoiser == next(iter(self._guiders)):
            return 0
        scheduler = self._pipe.scheduler
        boundary = self._pipe.config.boundary_ratio * scheduler.config.num_train_timesteps
        return int((scheduler.timesteps >= boundary).sum())

    def num_timesteps(self) -> int | None:
        """Return the number of the scheduler's timesteps that the loop visits, once it has begun; None for all."""
        guider, scheduler = self._running, self._pipe.scheduler
        steps, order, total = guider._num_inference_steps, scheduler.order, len(scheduler.timesteps)
        requested = getattr(scheduler, "num_inference_steps", None) or -(-total // order)
        warmup = max(total - requested * order, 0)
        rest = total - (getattr(scheduler, "begin_index", None) or 0)
        if -(-(rest - warmup) // order) == steps:
            return rest
        # The loop ends early: its number of steps then counts timesteps, even if a step has two.
        return min(int(steps) + warmup, rest) if order == 1 else min(int(steps), rest)

    def _follow(self, denoiser: str, guider: BaseGuidance) -> None:
        """Check that this call is the next prediction of the guider, or the first one of a later timestep."""
        at, last = (guider._step, guider._count_prepared), self._last.get(denoiser)
        if last is not None and at[0] is not None and at[0] < last[0]:
            last = None  # a new pass over the timesteps
        expected = last[1] + 1 if last is not None and at[0] == last[0] else 1
        if at[0] is None or at[1] != expected or expected > guider.num_conditions:
            raise UnsupportedModelError(MSG_NOT_BY_GUIDER.format(name=denoiser, pipeline=type(self._pipe).__name__))
        self._last[denoiser] = at


def has_own_blocks(pipe: Any) -> bool:
    """Return whether a modular pipeline has blocks outside of diffusers, which may change the denoiser."""
    return any(not type(block).__module__.startswith("diffusers.") for block in _blocks(pipe._blocks))


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for part in block.sub_blocks.values():
        yield from _blocks(part)
