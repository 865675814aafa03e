"""Loads the embedded pipeline from the package folder: no network, a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

WEIGHTS = Path(__file__).parent / "weights"


def load_demo_pipeline(*, torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The tiny text-to-image pipeline, on the CPU: 64x64 images of the scenes in `captions`.

    Made for 25 steps and a guidance scale of about 5.
    """
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
    shown = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
