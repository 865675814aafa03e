"""Pipelines that share their weights: each can be optimized in another way, so that they can take turns."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DiffusionPipeline

from tgate_compile.pipeline.attach import denoiser_names


def twin_of(pipe: DiffusionPipeline) -> Any:
    """A pipeline with denoisers and a scheduler of its own, on the weights of `pipe`, which must be plain."""
    twin = copy.copy(pipe)
    for name in denoiser_names(pipe):
        denoiser = getattr(pipe, name)
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
        setattr(twin, name, copy.deepcopy(denoiser, memo=shared))
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    twin.set_progress_bar_config(disable=True)
    return twin
