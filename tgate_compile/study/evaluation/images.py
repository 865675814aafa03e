"""The images of an evaluation: what is compared, their folder, and how they are made."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from tgate_compile._errors import ConfigurationError, UnsupportedModelError
from tgate_compile.engine.families import family_of
from tgate_compile.methods.method import Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import schedule_data
from tgate_compile.pipeline.generation import strip_of
from tgate_compile.pipeline.optimized import required_state_of, state_of
from tgate_compile.study.tuning.measure import GraphCosts
from tgate_compile.study.tuning.request import is_whole

PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """One row of an evaluation.

    Attributes:
        label: what it is called.
        schedule: None for the plain pipeline.
        steps: inference steps.
    """

    label: str
    schedule: Schedule | None
    steps: int

    @property
    def file_name(self) -> str:
        """The label, as far as file names take it."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.") or "contender"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {"schedule": None if self.schedule is None else schedule_data(self.schedule), "steps": self.steps}


Given = Mapping[str, Schedule | int] | Sequence[Schedule | int]


def contenders_of(given: Given, num_inference_steps: int) -> tuple[Contender, ...]:
    """The plain pipeline, then what is given.

    Raises:
        ConfigurationError: something else is given, or labels are too much alike.
    """
    if isinstance(given, Mapping):
        items = list(given.items())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        items = [(str(item) if isinstance(item, Schedule) else f"{item} steps", item) for item in given]
    else:
        items = []
    if not items or not all(isinstance(label, str) and label.strip() and _is_known(item) for label, item in items):
        raise ConfigurationError(
            "schedules must be a sequence, or a mapping from labels, of tgate_compile.Schedule or numbers of steps "
            f"of the plain pipeline, at least one, but got {given!r}."
        )
    contenders = [Contender(PLAIN, None, num_inference_steps)]
    for label, item in items:
        schedule = item if isinstance(item, Schedule) else None
        contenders.append(Contender(label, schedule, num_inference_steps if isinstance(item, Schedule) else item))
    names: dict[str, str] = {}
    for contender in contenders:
        other = names.setdefault(contender.file_name, contender.label)
        if other != contender.label or (contender.label == PLAIN and contender is not contenders[0]):
            raise ConfigurationError(
                f"The labels {other!r} and {contender.label!r} are too much alike to name files by. Give others."
            )
    return tuple(dict.fromkeys(contenders))


def _is_known(item: object) -> bool:
    return isinstance(item, Schedule) or (is_whole(item) and item >= 1)  # type: ignore[operator]


FORMAT = "tgate_compile.evaluation"
VERSION = 1

MSG_OTHER = (
    "{folder} has the images of another evaluation: {name} was {found}, and is {asked} now. Give another folder, or "
    "the same arguments."
)
MSG_NO_RECORD = "{path} is no record of an evaluation: {reason}. Give another folder."


@dataclass(frozen=True)
class Item:
    """One image: a prompt and the noise for it.

    Attributes:
        prompt: the prompt's number, from 0.
        seed: one of the seeds given.
    """

    prompt: int
    seed: int

    @property
    def noise(self) -> int:
        """The seed of the generator that the image is drawn from: another one for each prompt, since a set of images
        from the same noise is less diverse than it could be, which the Frechet distance would see."""
        return self.seed * 1_000_000 + self.prompt

    @property
    def file_name(self) -> str:
        """Without the ending."""
        return f"{self.prompt:05d}-{self.seed}"


class Folder:
    """Where an evaluation lives.

    - `request.json`: what was asked for;
    - `images/<contender>/<prompt number>-<seed>.png`, with prompt, seed and more as text in the file;
    - `latents/...safetensors`, the final latents;
    - `statistics/...npz`, for Frechet distances;
    - `results.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def results(self) -> Path:
        """Written when everything has been measured."""
        return self.path / "results.json"

    @property
    def statistics(self) -> Path:
        """The folder for statistics of features."""
        return self.path / "statistics"

    def image(self, contender: Contender, item: Item) -> Path:
        """The path of an image."""
        return self.path / "images" / contender.file_name / f"{item.file_name}.png"

    def open(self, settings: Mapping[str, Any], contenders: Sequence[Contender]) -> None:
        """Begin an evaluation, or go on with one.

        Raises:
            ConfigurationError: the folder has another one's images, or cannot be written to.
        """
        target = self.path / "request.json"
        asked = {contender.label: contender.as_dict() for contender in contenders}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = _read_record(target) if target.exists() else {"settings": settings, "contenders": {}}
            self._check("", found["settings"], settings)
            self._check("", {name: c for name, c in found["contenders"].items() if name in asked}, asked, partly=True)
            record = {"format": FORMAT, "version": VERSION, "settings": settings}
            write_json(target, {**record, "contenders": {**found["contenders"], **asked}})
        except OSError as error:
            raise ConfigurationError(
                f"The results folder {self.path} cannot be written to: {error.strerror or error}."
            ) from error

    def _check(self, where: str, found: object, asked: object, *, partly: bool = False) -> None:
        if isinstance(found, Mapping) and isinstance(asked, Mapping):
            for name in found if partly else {**found, **asked}:
                self._check(f"{where}.{name}".lstrip("."), found.get(name), asked.get(name))
        elif found != asked:
            shown = {"found": _short(found), "asked": _short(asked)}
            raise ConfigurationError(MSG_OTHER.format(folder=self.path, name=where, **shown))

    def has(self, contender: Contender, item: Item) -> bool:
        """Whether an image has been made; its latents are written before it."""
        return self.image(contender, item).exists()

    def keep(
        self,
        contender: Contender,
        item: Item,
        image: Image.Image,
        latents: torch.Tensor | None,
        texts: Mapping[str, object],
    ) -> None:
        """Write an image as a whole or not at all."""
        if latents is not None:
            _replace(self._latents(contender, item), lambda part: save_file({"latents": latents.contiguous()}, part))
        info = PngInfo()
        for name, value in texts.items():
            info.add_itxt(name, str(value))
        _replace(self.image(contender, item), lambda part: image.save(part, format="PNG", pnginfo=info))

    def load(self, contender: Contender, item: Item) -> Image.Image:
        """An image, in RGB, with the texts in its file as `info`."""
        with Image.open(self.image(contender, item)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")

    def load_latents(self, contender: Contender, item: Item) -> torch.Tensor | None:
        """Final latents in float32; None if they were not kept."""
        path = self._latents(contender, item)
        return load_file(path)["latents"].float() if path.exists() else None

    def write_results(self, data: Mapping[str, Any]) -> None:
        """Write `results.json`."""
        write_json(self.results, data)

    def clean(self) -> None:
        """Remove what killed processes have left half written; call it when every image is there."""
        for part in self.path.glob("**/*.part"):
            part.unlink(missing_ok=True)

    def _latents(self, contender: Contender, item: Item) -> Path:
        return self.path / "latents" / contender.file_name / f"{item.file_name}.safetensors"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _replace(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[str], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(str(part))
    part.replace(path)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(MSG_NO_RECORD.format(path=path, reason=error)) from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ConfigurationError(MSG_NO_RECORD.format(path=path, reason="its format or version is another"))
    return record


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Each = TypeVar("Each")


@dataclass(frozen=True)
class Share:
    """One of several processes that share a results folder. They do not talk to each other.

    Attributes:
        rank: which one, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun, `accelerate launch` and others say it, by RANK and WORLD_SIZE; alone if they say nothing.

        Raises:
            ConfigurationError: they say nonsense.
        """
        rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ConfigurationError(
                f"The environment says RANK={rank} and WORLD_SIZE={world}: expected whole numbers with 0 <= RANK < "
                "WORLD_SIZE."
            )
        return cls(int(rank), int(world))

    def of(self, items: Sequence[Each]) -> list[Each]:
        """This process's items: every `world`-th, so that nobody waits long for anybody."""
        return list(items[self.rank :: self.world])


#: Puts a schedule on a plain pipeline; at the end it is plain again.
Gated = Callable[[DiffusionPipeline, Schedule], AbstractContextManager[Any]]

_TEXTS = ("negative_prompt", *(f"{half}prompt_{number}" for half in ("", "negative_") for number in (2, 3)))


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
            raise UnsupportedModelError(
                f"Evaluations are of images, and {type(self._pipe).__name__} returns {given}. `tune` measures its "
                "latents."
            )
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
