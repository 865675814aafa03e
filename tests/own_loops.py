"""A custom pipeline over the tiny Stable Diffusion UNet, with denoising loops written in many ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.tiny_pipelines import VELOCITY, stable_diffusion

STEPS = 6
#: [prompts, tokens, dim]: embeddings of up to four prompts, and of the empty prompt.
TEXTS = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))
NO_TEXT = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(4))


class Looping(DiffusionPipeline):  # type: ignore[misc]
    """The plain loop: one pass over the timesteps, [uncond; cond] in one call. Subclasses change one thing."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        images: int = 1,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 5.0,
        callback: Any = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        generator = generator or torch.Generator().manual_seed(0)
        latents = torch.randn(images, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.timesteps():
            prediction = self.guided(latents, timestep, guidance_scale)
            latents = self.stepped(prediction, timestep, latents)
            if callback is not None:
                callback(self, timestep, latents)
        return latents

    def timesteps(self) -> Iterator[Any]:
        yield from self.scheduler.timesteps

    def stepped(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.scheduler.step(prediction, timestep, latents).prev_sample
        return result

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        if scale <= 1:
            return self.denoised(latents, timestep, TEXTS[: len(latents)])
        texts = torch.cat([NO_TEXT.expand(len(latents), -1, -1), TEXTS[: len(latents)]])
        uncond, cond = self.denoised(torch.cat([latents, latents]), timestep, texts).chunk(2)
        return uncond + scale * (cond - uncond)

    def denoised(self, latents: torch.Tensor, timestep: Any, texts: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unet(latents, timestep, encoder_hidden_states=texts).sample
        return result


def looping(pipeline: type[Looping] = Looping, scheduler: Any = None) -> Any:
    """Return a pipeline, always with the same weights."""
    return pipeline(stable_diffusion(layout="small").unet, scheduler or DDIMScheduler(**VELOCITY))
