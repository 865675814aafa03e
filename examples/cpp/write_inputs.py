"""Write the inputs of denoise.cpp as .npy files: latents, the denoiser's other arguments, timesteps and alphas.

    python examples/cpp/write_inputs.py INPUTS "a large red circle" 4 [sd | pixart]

The command is for the embedded pipelines; for another pipeline, call `write_inputs` in this file.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import tgate_compile


def write_inputs(pipe: Any, folder: Path, prompt: str | None, steps: int, seed: int = 0, **call: Any) -> None:
    """Write the inputs of one image for `pipe`, a Stable Diffusion or PixArt pipeline with a DDIM scheduler.

    `call` has further arguments of the pipeline's call, such as `prompt_embeds` and `guidance_scale`.
    """
    latents, arguments = _arguments(pipe, {"prompt": prompt, **call})
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    distance = scheduler.config.num_train_timesteps // steps
    cumulative = scheduler.alphas_cumprod
    alphas = [
        torch.stack([cumulative[now], cumulative[now - distance] if now >= distance else scheduler.final_alpha_cumprod])
        for now in map(int, scheduler.timesteps)
    ]
    tensors = {
        **arguments,  # with both halves under guidance
        "latents": torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed)),
        "timesteps": scheduler.timesteps,  # [steps]
        "alphas": torch.stack(alphas),  # [steps, 2]: before and after each step
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor.float().numpy())


def _arguments(pipe: Any, call: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the latents of a denoiser call, and its other tensors except the timestep, by their names in a manifest.

    They are recorded in an image of one step.
    """
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    recorded: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        recorded.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipe(**call, num_inference_steps=1, output_type="latent")
    finally:
        handle.remove()
    tensors = dict(_tensors(recorded[0]))
    tensors.pop("timestep")
    return tensors.pop(next(iter(recorded[0]))), tensors


def _tensors(arguments: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if torch.is_tensor(value):
            yield within + name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{within}{name}.")


if __name__ == "__main__":
    pipe = tgate_compile.load_demo_pipeline(*sys.argv[4:5])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    write_inputs(pipe, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
