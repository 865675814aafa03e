"""Bundles of tiny pipelines with all components: complete text-to-image programs, each exported once."""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import tgate_compile
from tests.exported import GATE, STEPS
from tests.once import made_once
from tests.tiny_pipelines import LATENT_SIZE, SIZE, TEXT_DIM, VELOCITY, pixart, sdxl, seeded, stable_diffusion

#: The length of PixArt's prompts.
LENGTH = 12


def plain() -> Any:
    """Return a Stable Diffusion pipeline with float32 timesteps, so that its graphs serve every scheduler."""
    pipe = stable_diffusion(layout="small")
    pipe.scheduler = EulerDiscreteScheduler(**VELOCITY)
    return pipe


def pixart_with_text() -> Any:
    """Return PixArt with a T5 whose tokens are letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    sizes = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    encoder = seeded(lambda: T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)), 9)
    pipe = pixart(micro_conditions=True)
    pipe.register_modules(tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0), text_encoder=encoder)
    return pipe


def sd3_with_text() -> Any:
    """Return Stable Diffusion 3 with two text encoders, without T5, and with a VAE whose latents are shifted."""
    parts = sdxl()
    parts.vae.register_to_config(shift_factor=0.1)
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_DIM,
            out_channels=4,
            pos_embed_max_size=LATENT_SIZE,
        )
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae,
        text_encoder=copy.deepcopy(parts.text_encoder_2),
        text_encoder_2=parts.text_encoder_2,
        text_encoder_3=None,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: Further arguments of the calls of some pipelines.
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": LENGTH,
        "height": SIZE,
        "width": SIZE,
    },
    "sd3": {"max_sequence_length": 0},
}
PIPELINES = {"sd": plain, "sdxl": sdxl, "pixart": pixart_with_text, "sd3": sd3_with_text}


def program(
    name: str = "sd",
    *,
    dynamic: bool | tuple[str, ...] = ("batch",),
    call: tuple[tuple[str, Any], ...] = (),
    binding_times: bool = True,
    **schedule: Any,
) -> Path:
    """Return a pipeline's bundle; do not modify it."""
    given = {"prompt": "", "num_inference_steps": STEPS, **CALLS.get(name, {}), **dict(call)}

    def make(folder: Path) -> None:
        gate = {} if "schedule" in schedule else {"gate_step": GATE}
        pipe = tgate_compile.optimize(PIPELINES[name](), **(gate | schedule), backend="eager")
        tgate_compile.export(
            pipe,
            folder,
            call=given,
            dynamic=dynamic,  # type: ignore[arg-type]
            components="all",
            binding_times=binding_times,
        )

    options = hashlib.sha256(repr((dynamic, call, binding_times, sorted(schedule.items()))).encode()).hexdigest()
    return made_once(f"program-{name}-{options[:8]}", make)


def noise(count: int = 1, size: int = SIZE) -> NDArray[Any]:
    """Return latents for the tiny pipelines."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, 4, size // 2, size // 2), generator=generator).numpy()


@functools.cache
def _optimized(name: str, schedule: tuple[tuple[str, Any], ...]) -> Any:
    pipe = PIPELINES[name]()
    return tgate_compile.optimize(pipe, **dict(schedule), backend="eager")


def reference(
    prompt: Any, latents: NDArray[Any], name: str = "sd", scheduler: Any = None, schedule: Any = None, **call: Any
) -> NDArray[Any]:
    """Return the images of a pipeline in PyTorch, [images, height, width, 3]."""
    pipe = _optimized(name, tuple((schedule or {"gate_step": GATE}).items()))
    own, pipe.scheduler = pipe.scheduler, scheduler or pipe.scheduler
    given = {"num_inference_steps": STEPS, **CALLS.get(name, {}), **call}
    try:
        images: NDArray[Any] = pipe(prompt, latents=torch.from_numpy(latents), output_type="np", **given).images
        return images
    finally:
        pipe.scheduler = own


def psnr(images: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the PSNR in decibels of images with values from 0 to 1."""
    assert images.shape == expected.shape
    assert np.isfinite(images).all()
    assert expected.std() > 0.05  # not a blank image
    error = float(np.square(images.astype(np.float64) - expected).mean())
    return -10 * float(np.log10(error)) if error else float("inf")
