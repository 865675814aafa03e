"""Pipelines from folders, from single files and from the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
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
MSG_FILE = (
    "{given} is not a checkpoint: single-file checkpoints end in {known}. Otherwise give a folder made by a pipeline's "
    "save_pretrained, or a hub id (owner/name)."
)
MSG_NO_FILE = "There is no file {given}."
MSG_DAMAGED = "{given} cannot be read as a checkpoint: {reason}"
MSG_LORA = "{given} has the weights of a LoRA, not of a model. Give it by --lora, beside the --model it was made for."
MSG_PART = (
    "{given} is not the checkpoint of a whole pipeline: it has no weights named {prefix}*, but, for example, {names}. "
    "Give a checkpoint with the denoiser, the VAE and the text encoder in one file."
)
MSG_NEEDS_CONFIG = (
    "{given} is a single-file checkpoint, which has weights only. The configuration of its pipeline{source} could not "
    "be had: {reason}\n"
    "Give it by --model-config: the hub id of a pipeline of this kind, or, without a network, a folder made by such a "
    "pipeline's save_pretrained (of which the weights are not read)."
)
MSG_CONFIG_ALONE = (
    "--model-config is the configuration for a --model that is a single-file checkpoint, and {given} is none. Leave it "
    "out."
)
MSG_CONFIG_FILE = (
    "--model-config {given} is a file. Give a folder made by a pipeline's save_pretrained, or a hub id: an original "
    ".yaml configuration does not have the tokenizer and the scheduler."
)
MSG_CANNOT_READ_FILES = "{pipeline} cannot be loaded from a single file. Give a folder made by its save_pretrained."
MSG_NOT_LOADED = "{given} could not be loaded: {reason}"
MSG_NOT_FOUND = (
    "{given} could not be had from the hub: {reason}\n"
    "There is no folder of this name here either. See that the id is right, the network is up, and, for a gated model, "
    "that you are logged in."
)
MSG_NO_UNET = "--unet puts in another UNet, but {pipeline} has none. Leave it out."


#: How the files of whole checkpoints end. Both are read without unpickling anything but tensors.
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")
#: What the denoiser's weights are called in the checkpoint of a whole pipeline.
_DENOISER_PREFIX = "model.diffusion_model."


def load_pipeline(
    model: str, unet: str | None, dtype: Dtype, device: torch.device, *, config: str | None = None
) -> tuple[DiffusionPipeline, Dtype]:
    """The pipeline in a folder, in a single file or on the hub, in the number format asked for or in the best one.

    Args:
        model: the folder, file or hub id.
        unet: likewise, of another UNet; None: its own.
        dtype: the number format.
        device: what it is going to run on.
        config: for a single file: the folder or hub id of a pipeline with its configuration; None: the one on the hub
            that diffusers takes for such weights.

    Raises:
        ConfigurationError: there is none, or it cannot be loaded.
    """
    is_file = Path(model).is_file()
    if config is not None and not is_file:
        _check_exists(model)
        raise ConfigurationError(MSG_CONFIG_ALONE.format(given=model))
    if is_file:
        index, config = _config_of_file(model, config)
    else:
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
    if config is not None:
        return _load_file(str(index.get("_class_name")), model, config, chosen, **parts), chosen
    return _load(DiffusionPipeline, model, chosen, **parts), chosen


def _config_of_file(model: str, config: str | None) -> tuple[Mapping[str, Any], str]:
    """The index of the pipeline that a single-file checkpoint is one of, and where its configuration is."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    weights = _weights_in(model)
    source = ""
    if config is None:
        known = infer_diffusers_model_type(weights)
        names = sorted(weights)
        # "v1" is what diffusers takes everything for that it does not know.
        if known == "v1" and not any(name.startswith(_DENOISER_PREFIX) for name in names):
            shown = ", ".join(names[:3]) or "nothing"
            raise ConfigurationError(MSG_PART.format(given=model, prefix=_DENOISER_PREFIX, names=shown))
        config = str(fetch_diffusers_config(weights)["pretrained_model_name_or_path"])
        source = f" ({config})"
    else:
        _check_config(config)
    try:
        return DiffusionPipeline.load_config(config), config
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigurationError(MSG_NEEDS_CONFIG.format(given=model, source=source, reason=reason)) from error


def _weights_in(model: str) -> Mapping[str, torch.Tensor]:
    """The tensors in a checkpoint, mapped into memory where the file permits."""
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    if Path(model).suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise ConfigurationError(MSG_FILE.format(given=model, known=" or ".join(CHECKPOINT_SUFFIXES)))
    try:
        weights: Mapping[str, torch.Tensor] = load_single_file_checkpoint(model, local_files_only=True)
    except Exception as error:  # of the libraries that read such files, each has errors of its own
        raise ConfigurationError(MSG_DAMAGED.format(given=model, reason=first_line(error))) from error
    if any(re.search(r"(^|[._])lora[._]", name) for name in weights):
        raise ConfigurationError(MSG_LORA.format(given=model))
    return weights


def _load_file(pipeline: str, model: str, config: str, dtype: Dtype, **parts: Any) -> Any:
    kind: Any = getattr(diffusers, pipeline, None)
    if not hasattr(kind, "from_single_file"):
        raise ConfigurationError(MSG_CANNOT_READ_FILES.format(pipeline=pipeline))
    try:
        return kind.from_single_file(model, config=config, **{_DTYPE_ARGUMENT: DTYPES[dtype]}, **parts)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SingleFileComponentError) as error:
        reason = f"its weights do not fit the configuration of {config}: {first_line(error)}"
        raise ConfigurationError(MSG_NOT_LOADED.format(given=model, reason=reason)) from error


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
    _check_exists(model)
    if path.is_dir() and not (path / DiffusionPipeline.config_name).is_file():
        raise ConfigurationError(MSG_NO_PIPELINE.format(given=model, index=DiffusionPipeline.config_name))


def _check_config(config: str) -> None:
    if Path(config).is_file():
        raise ConfigurationError(MSG_CONFIG_FILE.format(given=config))
    _check_folder(config)


def _check_exists(model: str) -> None:
    if Path(model).exists():
        return
    if Path(model).suffix.lower() in CHECKPOINT_SUFFIXES:
        raise ConfigurationError(MSG_NO_FILE.format(given=model))
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ConfigurationError(MSG_NO_FOLDER.format(given=model))


def first_line(error: Exception) -> str:
    """The gist of a long message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
