"""Loads the embedded pipeline from the package folder: no network, a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tgate_compile._errors import ConfigurationError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"

MSG_NEEDS_TRANSFORMERS = (
    "The embedded pipeline needs transformers for its text encoder, and it is not installed. "
    "Run: pip install 'tgate_compile[cli]'."
)


def load_demo_pipeline(*, torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The embedded text-to-image pipeline, on the CPU: 64x64 images of coloured shapes that follow simple captions.

    Made for 25 steps and a guidance scale of about 5; `weights/README.md` is its model card.

    Args:
        torch_dtype: of all its weights, which are stored in fp16.

    Raises:
        ConfigurationError: transformers is not installed.
    """
    # transformers is an extra, and importing a pipeline class takes seconds: not when tgate_compile is imported.
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(MSG_NEEDS_TRANSFORMERS) from error
    from diffusers import StableDiffusionPipeline

    with _no_progress_bars():
        pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            WEIGHTS,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
            # Loading in pieces saves nothing at this size and would ask for another package.
            low_cpu_mem_usage=False,
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        # Not the argument of from_pretrained, whose name depends on the version of diffusers, and not
        # the `to` of diffusers, which warns of layers kept in float32 even where there are none.
        torch.nn.Module.to(part, torch_dtype)
    return pipeline


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Two bars for ten megabytes are noise. Both libraries are left as they were."""
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
