"""Pipelines from folders and from the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from packaging.version import Version

from tgate_compile._cli.devices import DTYPES, choose_dtype
from tgate_compile._cli.options import Dtype
from tgate_compile._errors import ConfigurationError

logger = logging.getLogger(__name__)

_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"

MSG_NO_FOLDER = (
    "There is no folder {given}. Give a folder made by a pipeline's save_pretrained, or a hub id (owner/name)."
)
MSG_NO_PIPELINE = (
    "The folder {given} holds no diffusers pipeline: it has no {index}. Give the folder that save_pretrained made."
)
MSG_FILE = "{given} is a file. Give a folder made by a pipeline's save_pretrained, or a hub id (owner/name)."
MSG_NOT_LOADED = "{given} could not be loaded: {reason}"
MSG_NOT_FOUND = (
    "{given} could not be had from the hub: {reason}\n"
    "There is no folder of this name here either. See that the id is right, the network is up, and, for a gated model, "
    "that you are logged in."
)
MSG_NO_UNET = "--unet puts in another UNet, but {pipeline} has none. Leave it out."


def load_pipeline(model: str, unet: str | None, dtype: Dtype, device: torch.device) -> tuple[DiffusionPipeline, Dtype]:
    """The pipeline in a folder or on the hub, in the number format asked for or in the best one.

    Raises:
        ConfigurationError: there is none, or it cannot be loaded.
    """
    _check_folder(model)
    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        message = MSG_NOT_LOADED if Path(model).is_dir() else MSG_NOT_FOUND
        raise ConfigurationError(message.format(given=model, reason=first_line(error))) from error
    chosen = choose_dtype(dtype, str(index.get("_class_name")), device)
    parts = {}
    if unet is not None:
        if "unet" not in index:
            raise ConfigurationError(MSG_NO_UNET.format(pipeline=index.get("_class_name")))
        parts["unet"] = _load(UNet2DConditionModel, unet, chosen)
    return _load(DiffusionPipeline, model, chosen, **parts), chosen


def _load(kind: Any, source: str, dtype: Dtype, **parts: Any) -> Any:
    # Hub checkpoints come with fp16 files, without, or with nothing else.
    variants = ("fp16", None) if dtype is Dtype.fp16 else (None, "fp16")
    reasons = []
    for variant in variants:
        try:
            return kind.from_pretrained(source, variant=variant, **{_DTYPE_ARGUMENT: DTYPES[dtype]}, **parts)
        except (OSError, ValueError, ImportError) as error:
            logger.info("%s with variant %s: %s", source, variant, error)
            reasons.append((variant, error))
    reason = next(error for variant, error in reasons if variant is None)
    raise ConfigurationError(MSG_NOT_LOADED.format(given=source, reason=first_line(reason))) from reason


def _check_folder(model: str) -> None:
    path = Path(model)
    if path.is_file():
        raise ConfigurationError(MSG_FILE.format(given=model))
    if path.is_dir():
        if not (path / DiffusionPipeline.config_name).is_file():
            raise ConfigurationError(MSG_NO_PIPELINE.format(given=model, index=DiffusionPipeline.config_name))
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ConfigurationError(MSG_NO_FOLDER.format(given=model))


def first_line(error: Exception) -> str:
    """The gist of a long message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
