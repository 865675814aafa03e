"""Write the inputs of denoise.cpp as .npy files: initial latents, text embeddings, timesteps and alphas.

    python examples/cpp/write_inputs.py INPUTS "a large red circle" 4

The command is for the embedded pipeline; for another pipeline, call `write_inputs` in this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import tgate_compile


@torch.no_grad()
def write_inputs(pipe: Any, folder: Path, prompt: str, steps: int, seed: int = 0) -> None:
    """Write the inputs of one image for `pipe`, a Stable Diffusion pipeline with a DDIM scheduler, with guidance."""
    prompt_embeds, negative_embeds = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=True)
    size = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, size, size)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    distance = scheduler.config.num_train_timesteps // steps
    cumulative = scheduler.alphas_cumprod
    alphas = [
        torch.stack([cumulative[now], cumulative[now - distance] if now >= distance else scheduler.final_alpha_cumprod])
        for now in map(int, scheduler.timesteps)
    ]
    tensors = {
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
        "encoder_hidden_states": torch.cat([negative_embeds, prompt_embeds]),
        "timesteps": scheduler.timesteps,  # [steps]
        "alphas": torch.stack(alphas),  # [steps, 2]: before and after each step
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor.float().numpy())


if __name__ == "__main__":
    pipe = tgate_compile.load_demo_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    write_inputs(pipe, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
