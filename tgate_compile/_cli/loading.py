"""Load a pipeline: from a checkpoint, a folder or the embedded models."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from packaging.version import Version

from tgate_compile._cli.options import (
    DEFAULT_EMBEDDED,
    EMBEDDED,
    MSG_CONFIG_ALONE,
    SCHEDULERS,
    Dtype,
    Family,
    embedded_name,
    gpu_dtype,
    recognise,
)
from tgate_compile._demo import DemoVariant, demo_variant
from tgate_compile._demo.captions import caption_of, random_scene
from tgate_compile._errors import ConfigurationError

logger = logging.getLogger(__name__)

_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"

MSG_NO_FOLDER = (
    "There is no folder {given}. Give a folder made by a pipeline's save_pretrained, or a hub id (owner/name)."
)
MSG_NO_PIPELINE = (
    "The folder {given} does not contain a diffusers pipeline: it has no {index}. Give a folder made by a pipeline's "
    "save_pretrained."
)
MSG_FILE = (
    "{given} is not a checkpoint: single-file checkpoints end in {known}. Otherwise give a folder made by a pipeline's "
    "save_pretrained, or a hub id (owner/name)."
)
MSG_NO_FILE = "The file {given} does not exist. Check the path."
MSG_DAMAGED = "{given} cannot be read as a checkpoint: {reason}"
MSG_LORA = "{given} has the weights of a LoRA, not of a model. Pass it as --lora, together with --model."
MSG_PART = (
    "{given} is not the checkpoint of a whole pipeline: it has no weights named {prefix}*, but, for example, {names}. "
    "Give a checkpoint with the denoiser, the VAE and the text encoder in one file."
)
MSG_NEEDS_CONFIG = (
    "{given} is a single-file checkpoint, which has weights only. The configuration of its pipeline{source} could not "
    "be loaded: {reason}\n"
    "Pass it as --model-config: the hub id of a pipeline of this kind or, without a network, a folder made by such a "
    "pipeline's save_pretrained (its weights are not read)."
)
MSG_CONFIG_FILE = (
    "--model-config {given} is a file. Give a folder made by a pipeline's save_pretrained, or a hub id: an original "
    ".yaml configuration does not contain the tokenizer and the scheduler."
)
MSG_CANNOT_READ_FILES = "{pipeline} cannot be loaded from a single file. Give a folder made by save_pretrained."
MSG_NOT_LOADED = "{given} could not be loaded: {reason}"
MSG_NOT_FOUND = (
    "{given} could not be loaded from the hub: {reason}\n"
    "A folder of this name does not exist either. Check that the id is right, that the network is up and, for a gated "
    "model, that you are logged in."
)
MSG_OFFLINE = (
    "No network: {given} is not on this machine, and the hub cannot be reached ({reason}). Download it on another "
    "machine, and give the folder here. The embedded models work without a network: leave out --model."
)
MSG_NO_UNET = "--unet replaces the UNet, but {pipeline} has none. Leave it out."


#: File suffixes of whole checkpoints. Both are read without unpickling anything but tensors.
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")
#: Prefix of the denoiser's weights in the checkpoint of a whole pipeline.
_DENOISER_PREFIX = "model.diffusion_model."


def load_pipeline(
    model: str, unet: str | None, dtype: Dtype, device: torch.device, *, config: str | None = None
) -> tuple[DiffusionPipeline, Dtype]:
    """Load the pipeline from a folder, a single file or the hub, and return it with its number format.

    Args:
        model: the folder, file or hub id.
        unet: the folder or hub id of another UNet; None: the pipeline's own.
        dtype: the number format; `auto` is the best one for the pipeline and the device.
        device: the device that the pipeline will run on.
        config: for a single file: the folder or hub id of a pipeline with its configuration; None: the one on the hub
            that diffusers chooses for such weights.

    Raises:
        ConfigurationError: the pipeline does not exist or cannot be loaded.
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
            unreachable = why_unreachable(error)
            if unreachable is not None:
                raise ConfigurationError(MSG_OFFLINE.format(given=model, reason=unreachable)) from error
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
    """Return the index of the pipeline of a single-file checkpoint, and where its configuration is."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    weights = _weights_in(model)
    source = ""
    if config is None:
        known = infer_diffusers_model_type(weights)
        names = sorted(weights)
        # diffusers returns "v1" for weights that it does not recognize.
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
        unreachable = why_unreachable(error)
        reason = first_line(error) if unreachable is None else f"no network; the hub cannot be reached ({unreachable})"
        raise ConfigurationError(MSG_NEEDS_CONFIG.format(given=model, source=source, reason=reason)) from error


def _weights_in(model: str) -> Mapping[str, torch.Tensor]:
    """Return the tensors in a checkpoint, memory-mapped if the file permits."""
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    if Path(model).suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise ConfigurationError(MSG_FILE.format(given=model, known=" or ".join(CHECKPOINT_SUFFIXES)))
    try:
        weights: Mapping[str, torch.Tensor] = load_single_file_checkpoint(model, local_files_only=True)
    except Exception as error:  # each library that reads such files raises different errors
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
    # Checkpoints on the hub have fp16 files, other files, or both.
    variants = ("fp16", None) if dtype is Dtype.fp16 else (None, "fp16")
    reasons = []
    for variant in variants:
        try:
            return kind.from_pretrained(source, variant=variant, **{_DTYPE_ARGUMENT: DTYPES[dtype]}, **parts)
        except (OSError, ValueError, ImportError) as error:
            logger.info("%s with variant %s: %s", source, variant, error)
            reasons.append((variant, error))
    reason = next(error for variant, error in reasons if variant is None)
    unreachable = why_unreachable(reason)
    if unreachable is not None:
        raise ConfigurationError(MSG_OFFLINE.format(given=source, reason=unreachable)) from reason
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


def why_unreachable(error: BaseException) -> str | None:
    """Return why the hub is unreachable if that caused `error`, which may report only a missing file; else None."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "the environment sets HF_HUB_OFFLINE"
    return first_line(chain[-1]) if any(isinstance(each, LocalEntryNotFoundError) for each in chain) else None


def first_line(error: BaseException) -> str:
    """Return the first line of the message that is not blank, or the name of the error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


MSG_SCHEDULER = "The scheduler must be one of {known}, but got {given!r}."
MSG_NO_PEFT = "LoRA weights need the package peft. Install it with\n  pip install peft"
MSG_UNET_ALONE = "--unet replaces the UNet in the pipeline of --model, which is missing. Add it."


@dataclass(frozen=True)
class Loaded:
    """A pipeline that is ready to run, and where it comes from."""

    pipe: DiffusionPipeline
    family: Family
    source: str
    device: torch.device
    dtype: str
    embedded: DemoVariant | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether it is one of the pipelines that come with the package."""
        return self.embedded is not None

    @property
    def call(self) -> Mapping[str, Any]:
        """Arguments that every call of the pipeline needs."""
        return dict(self.family.call) if self.embedded is None else self.embedded.call

    def guided(self, scale: float) -> dict[str, Any]:
        """Return the argument of the pipeline's call for a guidance scale."""
        return {self.family.scale: scale}


def load(
    model: str | None,
    *,
    model_config: str | None = None,
    device: str = "auto",
    dtype: Dtype = Dtype.auto,
    scheduler: str | None = None,
    unet: str | None = None,
    lora: str | None = None,
) -> Loaded:
    """Load `model` (None: the embedded pipeline). All checks that need no model run before the long load.

    `embedded:sdxl` and the like are the other embedded pipelines. `model_config` is for a single-file checkpoint: see
    `load_pipeline`.

    Raises:
        ConfigurationError: the model, device, scheduler or LoRA cannot be loaded or used.
    """
    torch_device = choose_device(device)
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ConfigurationError(MSG_SCHEDULER.format(known=", ".join(SCHEDULERS), given=scheduler))
    if lora is not None:
        check_peft()
    embedded = embedded_name(model)
    if unet is not None and embedded is not None:
        raise ConfigurationError(MSG_UNET_ALONE)
    if model_config is not None and embedded is not None:
        raise ConfigurationError(MSG_CONFIG_ALONE.format(given=model or "the embedded model"))
    quieten_libraries()
    variant = None
    if embedded is not None:
        from tgate_compile._demo.pipeline import load_demo_pipeline

        variant = demo_variant(embedded)
        chosen = choose_dtype(dtype, variant.pipeline, torch_device)
        pipe: Any = load_demo_pipeline(embedded, torch_dtype=DTYPES[chosen])
    else:
        assert model is not None
        pipe, chosen = load_pipeline(model, unet, dtype, torch_device, config=model_config)
    if lora is not None:
        load_lora(pipe, lora)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    family = EMBEDDED if embedded == DEFAULT_EMBEDDED else recognise(pipe)
    if variant is not None and family is not EMBEDDED:
        gate = round(variant.steps * family.gate_step / family.steps)
        family = replace(
            family, name=f"embedded {embedded}", steps=variant.steps, guidance=variant.guidance, gate_step=max(1, gate)
        )
    if scheduler is None and family.scheduler is not None and _may_replace(pipe.scheduler, family):
        logger.info("%s: %s instead of %s", family.name, family.scheduler, type(pipe.scheduler).__name__)
        set_scheduler(pipe, family.scheduler)
    pipe.to(torch_device)
    pipe.set_progress_bar_config(disable=True)
    return Loaded(pipe, family, model or "embedded", torch_device, chosen.value, variant)


def check_peft() -> None:
    """Raise ConfigurationError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(MSG_NO_PEFT)


def set_scheduler(pipe: Any, name: str) -> None:
    """Set the scheduler with this short name, keeping the noise schedule of the checkpoint."""
    class_name, overrides = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **overrides)


def quieten_libraries() -> None:
    """Disable progress bars and advice of diffusers and transformers; downloads still show their progress."""
    from transformers.utils import logging as transformers_logging

    for library in (diffusers.utils.logging, transformers_logging):
        library.disable_progress_bar()
        if not logger.isEnabledFor(logging.DEBUG):
            library.set_verbosity_error()


def load_lora(pipe: Any, lora: str, *, name: str | None = None) -> None:
    """Load LoRA weights as the adapter `name`.

    Args:
        pipe: the pipeline.
        lora: a file, a folder or a hub id.
        name: the adapter's name; None: diffusers chooses one.

    Raises:
        ConfigurationError: the weights cannot be loaded.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigurationError(f"{type(pipe).__name__} does not support LoRA weights. Leave out --lora.")
    path = Path(lora)
    try:
        if path.is_file():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        else:
            pipe.load_lora_weights(lora, adapter_name=name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(MSG_NOT_LOADED.format(given=lora, reason=first_line(error))) from error


def _may_replace(scheduler: Any, family: Family) -> bool:
    # "trailing" marks few-step distilled checkpoints, which work only with their own scheduler.
    return type(scheduler).__name__ in family.replaced and scheduler.config.get("timestep_spacing") != "trailing"


DTYPES = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}


MSG_DEVICE = "The device must be auto, cpu, cuda, cuda:<number> or mps, but got {given!r}."


MSG_NO_DEVICE = (
    "torch {version} cannot use the device {given} on this machine. Use --device cpu, or leave out --device."
)


def choose_device(given: str) -> torch.device:
    """Return the device called `given`; `auto` is the best one available.

    Raises:
        ConfigurationError: the device does not exist or cannot be used.
    """
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if given == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if usable[name]))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigurationError(MSG_DEVICE.format(given=given)) from None
    if device.type not in usable:
        raise ConfigurationError(MSG_DEVICE.format(given=given))
    is_missing_gpu = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not usable[device.type] or is_missing_gpu:
        raise ConfigurationError(MSG_NO_DEVICE.format(given=given, version=torch.__version__))
    return device


def choose_dtype(given: Dtype, pipeline_class: str, device: torch.device) -> Dtype:
    """Return the number format asked for, or the best one for a pipeline of this class on `device`."""
    if given is not Dtype.auto:
        return given
    if device.type == "cpu":
        return Dtype.fp32
    chosen = Dtype(gpu_dtype(pipeline_class))
    if chosen is Dtype.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return Dtype.fp16
    return chosen


#: Shown first, in this order. Six single objects, two pairs; every combination is held out (a test checks that).
CHOSEN = (
    "a large red circle on a blue background",
    "a large yellow star on a green background",
    "a red square left of a yellow star on a white background",
    "a large purple triangle at the top of a white background",
    "a small orange square on a white background",
    "a large black square on an orange background",
    "a yellow circle above a green triangle on a blue background",
    "a small green star at the right of a blue background",
)


_SEED = 0


_SHARE_OF_PAIRS = 4  # one prompt in four


def demo_prompts(count: int) -> list[str]:
    """Return the first `count` prompts: the chosen ones, then held-out captions drawn with a fixed seed."""
    rng = np.random.default_rng(_SEED)
    prompts = list(CHOSEN[:count])
    while len(prompts) < count:
        objects = 2 if len(prompts) % _SHARE_OF_PAIRS == 0 else 1
        prompt = caption_of(random_scene(rng, objects, held_out=True))
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts
