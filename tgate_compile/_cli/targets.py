"""Where images are written to: checked before the work starts, and written with what made them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from tgate_compile._errors import ConfigurationError

MSG_NOT_PNG = "--out {given} is no .png file: images are written as PNG, which keeps the settings. Use {better}."
MSG_EXISTS = "{given} exists already. Give another --out, or --force to overwrite it."
MSG_NOT_WRITABLE = "Cannot write to the folder {given}: {reason}. Give another --out."

_OTHER_FORMATS = {".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp"}


def image_paths(out: Path, seeds: Sequence[int]) -> list[Path]:
    """One path per image: `out` itself for one image and a .png, else names that tell the seed.

    Raises:
        ConfigurationError: `out` is a file of another format.
    """
    suffix = out.suffix.lower()
    if suffix in _OTHER_FORMATS and not out.is_dir():
        raise ConfigurationError(MSG_NOT_PNG.format(given=out, better=out.with_suffix(".png")))
    if suffix != ".png" or out.is_dir():
        return [out / f"seed-{seed}.png" for seed in seeds]
    if len(seeds) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-seed-{seed}.png") for seed in seeds]


def check_targets(paths: Sequence[Path], *, force: bool) -> None:
    """Make the folders, and see that every path can be written.

    Raises:
        ConfigurationError: a folder cannot be made or written to, or a file exists and `force` is off.
    """
    for path in paths:
        check_folder(path.parent)
        if path.exists() and not force:
            raise ConfigurationError(MSG_EXISTS.format(given=path))


def check_folder(folder: Path) -> None:
    """Make `folder`, and see that it can be written to.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(MSG_NOT_WRITABLE.format(given=folder, reason=error.strerror)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(MSG_NOT_WRITABLE.format(given=folder, reason="no permission"))


def save_png(image: Image, path: Path, texts: Mapping[str, object]) -> None:
    """Write `image` with `texts` as text chunks, which image viewers show and PIL reads as `image.text`."""
    info = PngInfo()
    for key, value in texts.items():
        if value is not None:
            info.add_itxt(key, str(value))
    image.save(path, pnginfo=info)
