"""The demo's ways to run the same pipeline, and one run of each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL.Image import Image

import tgate_compile
from tgate_compile._demo.pipeline import load_demo_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Key = Literal["plain", "guidance_dropped", "eager", "inductor"]


@dataclass
class Mode:
    """One way to run the pipeline, and what it gave.

    Attributes:
        key: for programs.
        title: for people, short.
        pipe: a pipeline of its own: an optimized denoiser belongs to one pipeline.
        callback: given to each call as `callback_on_step_end`.
        first_seconds: the first call, capture and compilation included.
        seconds: the later calls, one image each.
        images: of the later calls.
    """

    key: Key
    title: str
    pipe: StableDiffusionPipeline
    callback: SDCFGCutoffCallback | None = None
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    @property
    def is_gated(self) -> bool:
        """Whether T-GATE runs."""
        return self.key in ("eager", "inductor")


@dataclass(frozen=True)
class Task:
    """What every mode is asked for."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    gate: int
    seed: int


def make_modes(gate: int, *, compiled: bool) -> list[Mode]:
    """The modes, plain first; with `compiled` the one by Inductor, too."""
    plain = load_demo_pipeline()
    # At the end of step gate - 1, and keeping the cond half: diffusers' own way to stop guidance.
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    modes = [
        Mode("plain", "plain", plain),
        Mode("guidance_dropped", "guidance drop", plain, cutoff),
        Mode("eager", "T-GATE eager", _optimized(gate, "eager")),
    ]
    if compiled:
        modes.append(Mode("inductor", "T-GATE compiled", _optimized(gate, "inductor")))
    for mode in modes:
        mode.pipe.set_progress_bar_config(disable=True)
    return modes


def warm_up(mode: Mode, task: Task) -> None:
    """The first call, which captures and compiles; its image is thrown away."""
    _, mode.first_seconds = _run(mode, task, 0)


def measure(mode: Mode, task: Task, index: int) -> None:
    """One image of prompt `index`, timed."""
    image, seconds = _run(mode, task, index)
    mode.images.append(image)
    mode.seconds.append(seconds)


def _optimized(gate: int, backend: str) -> StableDiffusionPipeline:
    return tgate_compile.optimize(load_demo_pipeline(), gate, backend=backend)


def _run(mode: Mode, task: Task, index: int) -> tuple[Image, float]:
    options: dict[str, Any] = {}
    if mode.callback is not None:
        options = {
            "callback_on_step_end": mode.callback,
            "callback_on_step_end_tensor_inputs": mode.callback.tensor_inputs,
        }
    began = time.perf_counter()
    result = mode.pipe(
        task.prompts[index],
        num_inference_steps=task.steps,
        guidance_scale=task.guidance,
        generator=torch.Generator().manual_seed(task.seed + index),
        **options,
    )
    return result.images[0], time.perf_counter() - began
