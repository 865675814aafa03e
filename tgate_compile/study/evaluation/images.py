"""Make the images of an evaluation and store them in a folder."""

from __future__ import annotations

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
from tgate_compile.methods.method import Method, Phase
from tgate_compile.methods.schedule import Schedule, schedule_of
from tgate_compile.methods.schedule_file import schedule_data
from tgate_compile.pipeline.attach import attached
from tgate_compile.pipeline.decisions import strip_of
from tgate_compile.pipeline.optimized import required_state_of, state_of
from tgate_compile.study.tuning.measure import GraphCosts
from tgate_compile.study.tuning.recorder import after_steps
from tgate_compile.study.tuning.request import is_whole

PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """A way to run the pipeline that is compared in an evaluation.

    Attributes:
        label: name in tables.
        schedule: the schedule; None for the plain pipeline.
        steps: number of inference steps.
    """

    label: str
    schedule: Schedule | None
    steps: int

    @property
    def file_name(self) -> str:
        """The label in lower case, with characters that are unsafe in file names replaced by "-"."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.") or "contender"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"schedule": None if self.schedule is None else schedule_data(self.schedule), "steps": self.steps}


Given = Mapping[str, Schedule | Method | int] | Sequence[Schedule | Method | int]


def contenders_of(given: Given, num_inference_steps: int) -> tuple[Contender, ...]:
    """Return the plain pipeline, followed by the user's contenders.

    Raises:
        ConfigurationError: `given` is invalid, or two labels give the same file name.
    """
    if isinstance(given, Mapping):
        items = list(given.items())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        items = [(str(item) if isinstance(item, (Method, Schedule)) else f"{item} steps", item) for item in given]
    else:
        items = []
    known = [(label, schedule_of(item) if isinstance(item, Method) else item) for label, item in items]
    if not known or not all(isinstance(label, str) and label.strip() and _is_known(item) for label, item in known):
        raise ConfigurationError(
            "schedules must be a sequence, or a mapping from labels, with at least one tgate_compile.Schedule or "
            f"number of steps of the plain pipeline, but got {given!r}."
        )
    contenders = [Contender(PLAIN, None, num_inference_steps)]
    for label, item in known:
        schedule = item if isinstance(item, Schedule) else None
        contenders.append(Contender(label, schedule, num_inference_steps if isinstance(item, Schedule) else item))
    names: dict[str, str] = {}
    for contender in contenders:
        other = names.setdefault(contender.file_name, contender.label)
        if other != contender.label or (contender.label == PLAIN and contender is not contenders[0]):
            raise ConfigurationError(
                f"The labels {other!r} and {contender.label!r} are too similar to be used in file names. Choose others."
            )
    return tuple(dict.fromkeys(contenders))


def _is_known(item: object) -> bool:
    return isinstance(item, Schedule) or (is_whole(item) and item >= 1)  # type: ignore[operator]


FORMAT = "tgate_compile.evaluation"
VERSION = 1

MSG_OTHER = (
    "{folder} contains the images of another evaluation: {name} was {found}, and is now {asked}. Choose another "
    "folder, or use the same arguments."
)
MSG_NO_RECORD = "{path} does not describe an evaluation: {reason}. Choose another folder."


@dataclass(frozen=True)
class Item:
    """An image to make: a prompt and a seed.

    Attributes:
        prompt: index of the prompt, from 0.
        seed: one of the seeds given by the user.
    """

    prompt: int
    seed: int

    @property
    def noise(self) -> int:
        """The seed of the image's generator.

        It differs between prompts, because a set of images from the same noise is less diverse, which would increase
        the Frechet distance.
        """
        return self.seed * 1_000_000 + self.prompt

    @property
    def file_name(self) -> str:
        """The name of the image's file, without suffix."""
        return f"{self.prompt:05d}-{self.seed}"


class Folder:
    """The folder of an evaluation.

    - `request.json`: the arguments;
    - `images/<contender>/<prompt index>-<seed>.png`: images, with prompt, seed and more as text in the file;
    - `latents/...safetensors`: final latents;
    - `statistics/...npz`: statistics for Frechet distances;
    - `results.json`: the results.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def results(self) -> Path:
        """The file with the results, written when everything has been measured."""
        return self.path / "results.json"

    @property
    def statistics(self) -> Path:
        """The folder for feature statistics."""
        return self.path / "statistics"

    def image(self, contender: Contender, item: Item) -> Path:
        """Return the path of an image."""
        return self.path / "images" / contender.file_name / f"{item.file_name}.png"

    def open(self, settings: Mapping[str, Any], contenders: Sequence[Contender]) -> None:
        """Start or resume an evaluation.

        Raises:
            ConfigurationError: the folder contains images of another evaluation, or cannot be written to.
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
                f"Cannot write to the results folder {self.path}: {error.strerror or error}."
            ) from error

    def _check(self, where: str, found: object, asked: object, *, partly: bool = False) -> None:
        if isinstance(found, Mapping) and isinstance(asked, Mapping):
            for name in found if partly else {**found, **asked}:
                self._check(f"{where}.{name}".lstrip("."), found.get(name), asked.get(name))
        elif found != asked:
            shown = {"found": _short(found), "asked": _short(asked)}
            raise ConfigurationError(MSG_OTHER.format(folder=self.path, name=where, **shown))

    def has(self, contender: Contender, item: Item) -> bool:
        """Return whether an image has been made; its latents are written before it."""
        return self.image(contender, item).exists()

    def keep(
        self,
        contender: Contender,
        item: Item,
        image: Image.Image,
        latents: torch.Tensor | None,
        texts: Mapping[str, object],
    ) -> None:
        """Write an image and its latents atomically."""
        if latents is not None:
            _replace(self._latents(contender, item), lambda part: save_file({"latents": latents.contiguous()}, part))
        info = PngInfo()
        for name, value in texts.items():
            info.add_itxt(name, str(value))
        _replace(self.image(contender, item), lambda part: image.save(part, format="PNG", pnginfo=info))

    def load(self, contender: Contender, item: Item) -> Image.Image:
        """Return an image in RGB, with the texts of its file in `info`."""
        with Image.open(self.image(contender, item)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")

    def load_latents(self, contender: Contender, item: Item) -> torch.Tensor | None:
        """Return the final latents in float32; None if they were not kept."""
        path = self._latents(contender, item)
        return load_file(path)["latents"].float() if path.exists() else None

    def write_results(self, data: Mapping[str, Any]) -> None:
        """Write `results.json`."""
        write_json(self.results, data)

    def clean(self) -> None:
        """Remove partial files of killed processes; call this when all images have been made."""
        for part in self.path.glob("**/*.part"):
            part.unlink(missing_ok=True)

    def _latents(self, contender: Contender, item: Item) -> Path:
        return self.path / "latents" / contender.file_name / f"{item.file_name}.safetensors"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
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
        raise ConfigurationError(MSG_NO_RECORD.format(path=path, reason="its format or version differs"))
    return record


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Element = TypeVar("Element")


@dataclass(frozen=True)
class Share:
    """This process's share of the work of several processes. They share a results folder, but do not communicate.

    Attributes:
        rank: index of this process, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """Read RANK and WORLD_SIZE, as set by torchrun, `accelerate launch` and others; by default a single process.

        Raises:
            ConfigurationError: the values are invalid.
        """
        rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ConfigurationError(
                f"The environment variables must be integers with 0 <= RANK < WORLD_SIZE, but got RANK={rank} and "
                f"WORLD_SIZE={world}."
            )
        return cls(int(rank), int(world))

    def of(self, items: Sequence[Element]) -> list[Element]:
        """Return this process's items: every `world`-th, so that all processes finish at about the same time."""
        return list(items[self.rank :: self.world])


_TEXTS = ("negative_prompt", *(f"{half}prompt_{number}" for half in ("", "negative_") for number in (2, 3)))


class Maker:
    """Make images and store them in a folder.

    Args:
        pipe: a plain pipeline.
        prompts: the prompts.
        call: further arguments of the pipeline's call.
        folder: the folder.
        names: names of its denoisers.
        backend: the backend of their graphs.
        precision: the dtype that the graphs compute in.
        keep_latents: whether to keep the final latents.
        on_image: called after each image with the contender's label.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        call: Mapping[str, Any],
        folder: Folder,
        names: Sequence[str],
        backend: str,
        precision: str,
        *,
        keep_latents: bool,
        on_image: Callable[[str], None],
    ) -> None:
        self._pipe = pipe
        self._prompts = prompts
        self._call = call
        self._folder = folder
        self._names = names
        self._backend = backend
        self._precision = precision
        self._keep_latents = keep_latents
        self._on_image = on_image

    def missing(self, contender: Contender, batches: Sequence[Sequence[Item]], share: Share) -> list[Sequence[Item]]:
        """Return this process's batches with missing images.

        A batch is always made as a whole, because rounding differs between batches of different sizes.
        """
        return [b for b in share.of(batches) if not all(self._folder.has(contender, item) for item in b)]

    def _applied(self, schedule: Schedule | None) -> AbstractContextManager[None]:
        if schedule is None:
            return nullcontext()
        return attached(self._pipe, schedule, self._names, backend=self._backend, precision=self._precision)

    def make(self, contender: Contender, batches: Sequence[Sequence[Item]]) -> None:
        """Make the images of the given batches.

        Raises:
            UnsupportedModelError: the pipeline does not make images, or does not support the schedule.
        """
        if not batches:
            return
        with self._applied(contender.schedule):
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
        if len(batch) > 1:  # then other texts must be lists as well
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
                f"Evaluations need images, but {type(self._pipe).__name__} returns {given}. Use `tune`, which measures "
                "latents."
            )
        has_latents = self._keep_latents and latents and latents[0].shape[0] == len(batch)
        return images, latents[0].cpu() if has_latents else None

    def _ran(self, contender: Contender, costs: dict[str, Mapping[str, float]]) -> tuple[str, float | None]:
        """Return the strip of the last generation, and its cost relative to the plain pipeline with equal steps."""
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
    """Return the multiply-accumulates of one image, and those of the plain pipeline for as many timesteps.

    Args:
        phases: phases of the denoiser calls.
        per_row: multiply-accumulates per row of the batch, by phase name.
        separate: whether each guidance half has a separate denoiser call.
    """
    guided = 1 if separate else 2  # rows of a guided call
    own = sum(per_row[phase.name] * (guided if phase.guided else 1) for phase in phases)
    timesteps = sum(0.5 if phase.guided and separate else 1.0 for phase in phases)
    halves = 2 if any(phase.guided for phase in phases) else 1
    return own, timesteps * halves * per_row["full"]


@contextmanager
def final_latents_of(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Capture the final latents, [images, ...], of a call that makes images; the yielded list contains them afterwards.

    They are the result of the scheduler's last step.
    """
    latents: list[torch.Tensor] = []

    def keep(result: Any) -> None:
        latents[:] = [result[0]]

    with after_steps(pipe.scheduler, keep):
        yield latents
