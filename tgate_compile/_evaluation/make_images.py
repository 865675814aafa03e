"""Make the images of an evaluation that are not there yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tgate_compile._errors import UnsupportedModelError
from tgate_compile._evaluation.contenders import Contender
from tgate_compile._evaluation.folder import Folder, Item
from tgate_compile._evaluation.share import Share
from tgate_compile._families import family_of
from tgate_compile._generation import strip_of
from tgate_compile._optimized import required_state_of, state_of
from tgate_compile._schedule import Phase, Schedule
from tgate_compile._tuning.graph_costs import GraphCosts

#: Puts a schedule on a plain pipeline; at the end it is plain again.
Gated = Callable[[DiffusionPipeline, Schedule], AbstractContextManager[Any]]

_TEXTS = ("negative_prompt", *(f"{half}prompt_{number}" for half in ("", "negative_") for number in (2, 3)))

MSG_NO_IMAGES = "Evaluations are of images, and {pipeline} returns {given}. `tune` measures its latents."


class Maker:
    """Makes images into a folder.

    Args:
        pipe: a plain pipeline.
        prompts: what to show.
        call: further arguments of its call.
        folder: where to.
        gated: puts schedules on.
        keep_latents: keep final latents, too.
        on_image: called after each image, with the contender's label.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        call: Mapping[str, Any],
        folder: Folder,
        gated: Gated,
        *,
        keep_latents: bool,
        on_image: Callable[[str], None],
    ) -> None:
        self._pipe = pipe
        self._prompts = prompts
        self._call = call
        self._folder = folder
        self._gated = gated
        self._keep_latents = keep_latents
        self._on_image = on_image

    def missing(self, contender: Contender, batches: Sequence[Sequence[Item]], share: Share) -> list[Sequence[Item]]:
        """This process's batches that are not there yet. Batches are made as a whole: another one's images would be
        rounded in another way."""
        return [b for b in share.of(batches) if not all(self._folder.has(contender, item) for item in b)]

    def make(self, contender: Contender, batches: Sequence[Sequence[Item]]) -> None:
        """Make these batches.

        Raises:
            UnsupportedModelError: the pipeline makes no images, or does not take the schedule.
        """
        if not batches:
            return
        with self._gated(self._pipe, contender.schedule) if contender.schedule is not None else nullcontext():
            costs: dict[str, Mapping[str, float]] = {}
            for batch in batches:
                images, latents = self._run(contender, batch)
                strip, cost = self._ran(contender, costs)
                for index, item in enumerate(batch):
                    texts = {
                        "prompt": self._prompts[item.prompt],
                        "seed": item.noise,
                        "contender": contender.label,
                        "steps": contender.steps,
                        "strip": strip,
                        "cost": "" if cost is None else repr(cost),
                    }
                    own = None if latents is None else latents[index]
                    self._folder.keep(contender, item, images[index], own, texts)
                    self._on_image(contender.label)

    def _run(self, contender: Contender, batch: Sequence[Item]) -> tuple[list[Image.Image], torch.Tensor | None]:
        prompts = [self._prompts[item.prompt] for item in batch]
        call = dict(self._call)
        if len(batch) > 1:  # then other texts have to be lists, too
            call |= {name: [call[name]] * len(batch) for name in _TEXTS if isinstance(call.get(name), str)}
        # Noise from the CPU is the same on every device.
        noise = [torch.Generator().manual_seed(item.noise) for item in batch]
        with final_latents_of(self._pipe) as latents:
            images = self._pipe(
                **call,
                num_inference_steps=contender.steps,
                prompt=prompts[0] if len(batch) == 1 else prompts,
                generator=noise[0] if len(batch) == 1 else noise,
                output_type="pil",
                return_dict=False,
            )[0]
        if not isinstance(images, list) or not all(isinstance(image, Image.Image) for image in images):
            given = f"a {type(images).__name__}" + (f" of {type(images[0]).__name__}" if len(images) else "")
            raise UnsupportedModelError(MSG_NO_IMAGES.format(pipeline=type(self._pipe).__name__, given=given))
        has_latents = self._keep_latents and latents and latents[0].shape[0] == len(batch)
        return images, latents[0].cpu() if has_latents else None

    def _ran(self, contender: Contender, costs: dict[str, Mapping[str, float]]) -> tuple[str, float | None]:
        """The strip of the last generation, and what it cost; the plain pipeline, in as many steps, is 1."""
        state = state_of(self._pipe)
        if state is None:
            return "F" * contender.steps, None
        family = family_of(required_state_of(self._pipe).pipeline_class)
        total = plain = 0.0
        strips = []
        for name, hook in state.hooks.items():
            if hook.last is None or not hook.last.steps:
                continue
            phases = [phase for _, phase in hook.last.steps]
            strips.append(strip_of(hook.last.steps))
            if name not in costs or not {phase.name for phase in phases} <= set(costs[name]):
                costs[name] = GraphCosts.of(hook).per_row
            own, of_plain = cost_of(phases, costs[name], separate=bool(family.calls))
            total, plain = total + own, plain + of_plain
        return "|".join(strips), total / plain


def cost_of(phases: Sequence[Phase], per_row: Mapping[str, float], *, separate: bool) -> tuple[float, float]:
    """Multiply-accumulates for one image of these denoiser calls, and of as many timesteps of the plain pipeline.

    Args:
        phases: of the calls.
        per_row: multiply-accumulates by the phase's name, for each row of the batch.
        separate: whether each guidance half has a call of its own.
    """
    guided = 1 if separate else 2  # rows of a guided call
    own = sum(per_row[phase.name] * (guided if phase.guided else 1) for phase in phases)
    timesteps = sum(0.5 if phase.guided and separate else 1.0 for phase in phases)
    halves = 2 if any(phase.guided for phase in phases) else 1
    return own, timesteps * halves * per_row["full"]


@contextmanager
def final_latents_of(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Around one call that makes images: afterwards the list has the final latents, [images, ...], too.

    They are what the scheduler's last step returns. A callback would not do: not all pipelines take one.
    """
    latents: list[torch.Tensor] = []
    scheduler = pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)  # pipelines ask its signature whether it takes their generator
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents[:] = [result[0]]
        return result

    scheduler.step = watched
    try:
        yield latents
    finally:
        del scheduler.step
