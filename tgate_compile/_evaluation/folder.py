"""The results folder: every image is a file of its own, so that an evaluation can be killed and goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from tgate_compile._errors import ConfigurationError
from tgate_compile._evaluation.contenders import Contender

FORMAT = "tgate_compile.evaluation"
VERSION = 1

MSG_OTHER = (
    "{folder} has the images of another evaluation: {name} was {found}, and is {asked} now. Give another folder, or "
    "the same arguments."
)
MSG_NO_RECORD = "{path} is no record of an evaluation: {reason}. Give another folder."
MSG_NOT_WRITTEN = "The results folder {folder} cannot be written to: {reason}."


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
                MSG_NOT_WRITTEN.format(folder=self.path, reason=error.strerror or error)
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
