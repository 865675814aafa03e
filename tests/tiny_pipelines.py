"""Tiny pipelines of the real diffusers classes with seeded random weights, without downloads or mocks.

With random weights alone the text would hardly affect the denoiser. Norms, biases and the cross-attentions'
outputs are therefore perturbed, so that gating changes the result by far more than rounding.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Module = TypeVar("Module", bound=torch.nn.Module)

TOKENS = 16
TEXT_DIM = 32
LATENT_SIZE = 8
#: Side of an image in pixels: the VAE has two blocks, so that its scale factor is 2.
SIZE = 2 * LATENT_SIZE
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
#: A random denoiser does not predict noise: as epsilon its output makes the latents explode, but not as a velocity.
VELOCITY = {**SCHEDULE, "prediction_type": "v_prediction"}
PROMPT = "red cat"
PROMPTS = ["red cat", "blue dog"]


def seeded(build: Callable[[], Module], seed: int = 0) -> Module:
    """Return the module from `build` with seeded, perturbed weights; the global random state is unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "attn2.to_" in name:
                    parameter.mul_(3)
                elif "add_embedding" in name or "adaln_single" in name:
                    parameter.mul_(2)  # pooled text, sizes
                elif not parameter.any():
                    parameter.copy_(0.05 * torch.randn_like(parameter))  # ControlNet's zero convolutions
    return module.eval().requires_grad_(False)


# Components, each built once and copied for each pipeline.


@functools.cache
def _tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _text_config(projection: int) -> CLIPTextConfig:
    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@functools.cache
def _text_encoder() -> CLIPTextModel:
    return seeded(lambda: CLIPTextModel(_text_config(TEXT_DIM)), 1)


@functools.cache
def _text_encoder_2() -> CLIPTextModelWithProjection:
    return seeded(lambda: CLIPTextModelWithProjection(_text_config(TEXT_DIM)), 2)


@functools.cache
def _vae() -> AutoencoderKL:
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
        ),
        3,
    )


@functools.cache
def _unet(layout: str, in_channels: int = 4, **extra: Any) -> UNet2DConditionModel:
    layouts: dict[str, dict[str, Any]] = {
        # Projections around the attentions are convolutions; all blocks have the same (misnamed) number of heads.
        "sd1": {"attention_head_dim": 4, "cross_attention_dim": TEXT_DIM},
        # The same with one block, which takes a quarter of the time to capture.
        "small": {
            "attention_head_dim": 4,
            "cross_attention_dim": TEXT_DIM,
            "block_out_channels": (32,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
        # Without a middle block: the smallest UNet that can be captured.
        "least": {
            "attention_head_dim": 2,
            "cross_attention_dim": TEXT_DIM,
            "block_out_channels": (16,),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "mid_block_type": None,
            "up_block_types": ("UpBlock2D",),
        },
        # Linear projections; the number of heads differs between blocks.
        "sd2": {"attention_head_dim": (4, 8), "cross_attention_dim": TEXT_DIM, "use_linear_projection": True},
        "sdxl": {
            "attention_head_dim": (4, 8),
            "cross_attention_dim": 2 * TEXT_DIM,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT_DIM + 6 * 8,
        },
    }
    return seeded(
        lambda: UNet2DConditionModel(
            **{
                "sample_size": LATENT_SIZE,
                "in_channels": in_channels,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                **layouts[layout],
                **extra,
            }
        ),
        4,
    )


@functools.cache
def _pixart_transformer(micro_conditions: bool) -> PixArtTransformer2DModel:
    return seeded(
        lambda: PixArtTransformer2DModel(
            # The pipelines pass resolution and aspect ratio only to models of this size.
            sample_size=128 if micro_conditions else LATENT_SIZE,
            num_layers=2,
            patch_size=2,
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=48,
            caption_channels=TEXT_DIM,
            use_additional_conditions=micro_conditions,
        ),
        5,
    )


# Pipelines.


def _silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd_components(layout: str = "sd1", **unet: Any) -> dict[str, Any]:
    modules = {"vae": _vae(), "text_encoder": _text_encoder(), "unet": _unet(layout, **unet)}
    return {
        **copy.deepcopy(modules),
        "tokenizer": _tokenizer(),
        "scheduler": DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def stable_diffusion(name: str = "StableDiffusionPipeline", layout: str = "sd1", **unet: Any) -> Any:
    """Return Stable Diffusion in the layout of 1.x ("sd1", "small", "least"), or of 2.x with v-prediction ("sd2")."""
    components = _sd_components(layout, **unet)
    if layout != "sd1":
        components["scheduler"] = DDIMScheduler(**VELOCITY, clip_sample=False)
    return _silent(getattr(diffusers, name)(**components, requires_safety_checker=False))


def latent_consistency(name: str = "LatentConsistencyModelPipeline", *, embedded_guidance: bool = True) -> Any:
    """Return LCM: distilled to few steps, with guidance embedded as a number or omitted, never as a second half."""
    components = _sd_components(**({"time_cond_proj_dim": 16} if embedded_guidance else {}))
    components["scheduler"] = LCMScheduler(**SCHEDULE)
    return _silent(getattr(diffusers, name)(**components, requires_safety_checker=False))


def controlnet() -> Any:
    components = _sd_components()
    components["controlnet"] = seeded(
        lambda: ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 16)), 6
    )
    return _silent(diffusers.StableDiffusionControlNetPipeline(**components, requires_safety_checker=False))


def sdxl(name: str = "StableDiffusionXLPipeline", scheduler: Any = None) -> Any:
    modules = {
        "vae": _vae(),
        "text_encoder": _text_encoder(),
        "text_encoder_2": _text_encoder_2(),
        "unet": _unet("sdxl"),
    }
    components = {
        **copy.deepcopy(modules),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
        "scheduler": EulerDiscreteScheduler(**VELOCITY) if scheduler is None else scheduler,
    }
    return _silent(getattr(diffusers, name)(**components, add_watermarker=False))


def pixart(name: str = "PixArtAlphaPipeline", *, micro_conditions: bool = False) -> Any:
    """Return PixArt without its text encoder: T5 has no useful tiny form, so prompts are passed as embeddings."""
    modules = {"vae": _vae(), "transformer": _pixart_transformer(micro_conditions)}
    return _silent(
        getattr(diffusers, name)(
            tokenizer=None,
            text_encoder=None,
            scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            **copy.deepcopy(modules),
        )
    )


def pixart_prompt(batch: int = 1, tokens: int = 6) -> dict[str, Any]:
    """Return embedded prompts and negative prompts of different lengths, as call arguments."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[:, -2:] = 0
    negative_mask = torch.ones(batch, tokens, dtype=torch.long)
    negative_mask[:, 2:] = 0
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": torch.randn(batch, tokens, TEXT_DIM, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(batch, tokens, TEXT_DIM, generator=generator),
        "negative_prompt_attention_mask": negative_mask,
        "use_resolution_binning": False,
        "height": SIZE,
        "width": SIZE,
    }


def load_ip_adapter(pipe: Any, scale: float = 0.8) -> None:
    """Load a random IP-Adapter through diffusers' own weight loader."""
    unet = pipe.unet
    dim = unet.config.cross_attention_dim
    channels = unet.config.block_out_channels
    processors = {}
    with torch.random.fork_rng():
        torch.manual_seed(8)
        key = 1
        for name in unet.attn_processors:
            if name.startswith("mid_block"):
                size = channels[-1]
            elif name.startswith("up_blocks"):
                size = channels[::-1][int(name.split(".")[1])]
            else:
                size = channels[int(name.split(".")[1])]
            if "attn2" in name:
                state = IPAdapterAttnProcessor2_0(hidden_size=size, cross_attention_dim=dim).state_dict()
                processors[f"{key}.to_k_ip.weight"] = 3 * state["to_k_ip.0.weight"]
                processors[f"{key}.to_v_ip.weight"] = 3 * state["to_v_ip.0.weight"]
                key += 2
        projection = ImageProjection(cross_attention_dim=dim, image_embed_dim=dim, num_image_text_embeds=4)
    names = {"image_embeds": "proj", "norm": "norm"}
    image_proj = {}
    for name, value in projection.state_dict().items():
        first, last = name.split(".")
        image_proj[f"{names[first]}.{last}"] = value
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": processors}])
    pipe.set_ip_adapter_scale(scale)


def image_embeds(pipe: Any, batch: int = 1) -> list[torch.Tensor]:
    """Return embeddings like an image encoder's for `ip_adapter_image_embeds`, the negative half first."""
    dim = pipe.unet.config.cross_attention_dim
    return [torch.randn(2 * batch, 1, dim, generator=torch.Generator().manual_seed(9))]


def add_lora(denoiser: torch.nn.Module, name: str = "default", seed: int = 10) -> None:
    """Add a LoRA with non-zero weights to every attention projection, like `pipe.load_lora_weights`."""
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
        denoiser.add_adapter(config, adapter_name=name)
    denoiser.requires_grad_(False)


def image(batch: int = 1, size: int = SIZE) -> torch.Tensor:
    """Return an image for img2img and inpainting, with values in [0, 1]."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(11))


def mask(size: int = SIZE) -> torch.Tensor:
    """Return a mask that selects the left half for inpainting."""
    result = torch.zeros(1, 1, size, size)
    result[..., : size // 2] = 1
    return result


def run(pipe: Any, prompt: Any = PROMPT, *, seed: int = 0, steps: int = 6, **call: Any) -> Any:
    """Call `pipe` with a seeded generator; latents are returned unless `output_type` says otherwise."""
    if "prompt_embeds" not in call:
        call["prompt"] = prompt
    call = {"num_inference_steps": steps, "output_type": "latent", **call}
    return pipe(generator=torch.Generator().manual_seed(seed), **call).images
