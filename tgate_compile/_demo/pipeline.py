"""Load an embedded pipeline from the package folder, without network access and in a fraction of a second."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from tgate_compile._demo import DEMO_VARIANTS, demo_variant
from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from diffusers import (
        DiffusionPipeline,
        LatentConsistencyModelPipeline,
        PixArtAlphaPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

_HERE = Path(__file__).parent
WEIGHTS = _HERE / DEMO_VARIANTS["sd"].folder


@overload
def load_demo_pipeline(
    variant: Literal["sd"] = "sd", *, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline: ...


@overload
def load_demo_pipeline(
    variant: Literal["sdxl"], *, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionXLPipeline: ...


@overload
def load_demo_pipeline(
    variant: Literal["pixart"], *, torch_dtype: torch.dtype = torch.float32
) -> PixArtAlphaPipeline: ...


@overload
def load_demo_pipeline(
    variant: Literal["lcm"], *, torch_dtype: torch.dtype = torch.float32
) -> LatentConsistencyModelPipeline: ...


@overload
def load_demo_pipeline(
    variant: Literal["sd3"], *, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusion3Pipeline: ...


@overload
def load_demo_pipeline(variant: str, *, torch_dtype: torch.dtype = torch.float32) -> DiffusionPipeline: ...


def load_demo_pipeline(variant: str = "sd", *, torch_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load an embedded text-to-image pipeline, which draws coloured shapes in 64x64 pixels from simple captions.

    There are five models, `sd`, `sdxl`, `pixart`, `lcm` and `sd3`, each of the corresponding diffusers class.
    `DEMO_VARIANTS` has the number of steps and the guidance scale that each was trained for, and further arguments that
    its call needs. `weights/README.md` is the model card. The pipeline is on the CPU.

    Args:
        variant: name of the model.
        torch_dtype: dtype of all weights, which are stored in fp16.

    Raises:
        ConfigurationError: `variant` is unknown, or transformers is not installed.
    """
    chosen = demo_variant(variant)
    # Imported late, because transformers is optional and importing a pipeline class takes seconds.
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "The embedded pipeline needs transformers for its text encoder, but it is not installed. Run: pip "
            "install 'tgate_compile[cli]'."
        ) from error
    import diffusers

    classes = {
        "weights/vae": diffusers.AutoencoderKL,
        "weights/scheduler": diffusers.DPMSolverMultistepScheduler,
        "weights/text_encoder": transformers.CLIPTextModel,
        "weights/tokenizer": transformers.CLIPTokenizer,
        "weights_sdxl/text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    with _no_progress_bars():
        shared = {
            part: classes[folder].from_pretrained(_HERE / folder, local_files_only=True)
            for part, folder in chosen.shared.items()
        }
        pipeline: DiffusionPipeline = getattr(diffusers, chosen.pipeline).from_pretrained(
            _HERE / chosen.folder,
            **shared,
            **dict.fromkeys(chosen.absent),
            local_files_only=True,
            use_safetensors=True,
            # Loading in pieces saves nothing at this size and would need another package.
            low_cpu_mem_usage=False,
        )
    for part in pipeline.components.values():
        # Neither the argument of from_pretrained, whose name depends on the version of diffusers, nor diffusers' own
        # `to`, which warns about layers kept in float32 even if there are none.
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch_dtype)
    if chosen.call:
        _set_defaults(pipeline, chosen.call)
    return pipeline


def _set_defaults(pipeline: Any, defaults: Mapping[str, object]) -> None:
    """Give the call of this one object other defaults, by a subclass of its class with the same name."""
    kind = type(pipeline)
    plain_call = kind.__call__
    signature = inspect.signature(plain_call)

    @functools.wraps(plain_call)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        left = {name: value for name, value in defaults.items() if name not in given}
        return plain_call(*args, **kwargs, **left)

    parameters = [each.replace(default=defaults.get(name, each.default)) for name, each in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    pipeline.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers, which are distracting for ten megabytes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
