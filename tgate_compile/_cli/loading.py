"""From the command line's words to a loaded pipeline on its device."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from tgate_compile._cli.checkpoints import MSG_CONFIG_ALONE, MSG_NOT_LOADED, first_line, load_pipeline
from tgate_compile._cli.devices import DTYPES, choose_device, choose_dtype
from tgate_compile._cli.families import EMBEDDED, SCHEDULERS, Family, recognise
from tgate_compile._cli.options import Dtype
from tgate_compile._demo.variants import DemoVariant, demo_variant
from tgate_compile._errors import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_EMBEDDED = "sd"
EMBEDDED_PREFIX = "embedded:"

MSG_SCHEDULER = "The scheduler must be one of {known}, but got {given!r}."
MSG_NO_PEFT = "--lora needs the package peft. Install it with\n  pip install peft"
MSG_UNET_ALONE = "--unet puts another UNet into the pipeline of --model, which is missing. Add it."


@dataclass(frozen=True)
class Loaded:
    """A pipeline that is ready to run, and what it was made of."""

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
        return {} if self.embedded is None else self.embedded.call


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
    """Load `model` (None: the embedded pipeline). Whatever can be checked before a long load is checked first.

    `embedded:sdxl` and the like are the other embedded pipelines. `model_config` is for a single-file checkpoint: see
    `load_pipeline`.

    Raises:
        ConfigurationError: the model, device, scheduler or LoRA cannot be had.
    """
    torch_device = choose_device(device)
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ConfigurationError(MSG_SCHEDULER.format(known=", ".join(SCHEDULERS), given=scheduler))
    if lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigurationError(MSG_NO_PEFT)
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
        _load_lora(pipe, lora)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    family = EMBEDDED if embedded == DEFAULT_EMBEDDED else recognise(pipe)
    if variant is not None and family is not EMBEDDED:
        family = replace(family, name=f"embedded {embedded}", steps=variant.steps, guidance=variant.guidance)
    if scheduler is None and family.scheduler is not None and _may_replace(pipe.scheduler, family):
        logger.info("%s: %s instead of %s", family.name, family.scheduler, type(pipe.scheduler).__name__)
        set_scheduler(pipe, family.scheduler)
    pipe.to(torch_device)
    pipe.set_progress_bar_config(disable=True)
    return Loaded(pipe, family, model or "embedded", torch_device, chosen.value, variant)


def embedded_name(model: str | None) -> str | None:
    """The name of the embedded pipeline that is asked for; None for a folder, a file or a hub id."""
    if model is None:
        return DEFAULT_EMBEDDED
    return model.removeprefix(EMBEDDED_PREFIX) if model.startswith(EMBEDDED_PREFIX) else None


def set_scheduler(pipe: Any, name: str) -> None:
    """Put in the scheduler of this short name, with the noise schedule of the checkpoint's own."""
    class_name, overrides = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **overrides)


def quieten_libraries() -> None:
    """No progress bars and no advice from the libraries underneath; downloads from the hub still show theirs."""
    from transformers.utils import logging as transformers_logging

    for library in (diffusers.utils.logging, transformers_logging):
        library.disable_progress_bar()
        if not logger.isEnabledFor(logging.DEBUG):
            library.set_verbosity_error()


def _load_lora(pipe: Any, lora: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigurationError(f"{type(pipe).__name__} takes no LoRA weights. Leave --lora out.")
    path = Path(lora)
    try:
        if path.is_file():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        else:
            pipe.load_lora_weights(lora)
    except (OSError, ValueError) as error:
        raise ConfigurationError(MSG_NOT_LOADED.format(given=lora, reason=first_line(error))) from error


def _may_replace(scheduler: Any, family: Family) -> bool:
    # "trailing" marks few-step distilled checkpoints, which work with their own scheduler only.
    return type(scheduler).__name__ in family.replaced and scheduler.config.get("timestep_spacing") != "trailing"
