"""Assemble the trained parts into the folders that are part of the package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from tgate_compile._demo import DEMO_VARIANTS
from training.denoisers import FAMILIES
from training.objectives import SOLVER_STEPS
from training.text_encoders import embedded_with_projection

_KEPT = {"README.md", "attribute_reader.safetensors"}  # not made here
_NO_SAFETY: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def export_pipeline(parts: Path, checkpoint: Path, demo: Path) -> None:
    """Write the averaged weights of `checkpoint` and the family's other parts to its folder in `demo`.

    Parts shared with `sd` stay in the folder of `sd`, which must exist.
    """
    pipeline, family = assemble(parts, checkpoint, demo / DEMO_VARIANTS["sd"].folder)
    variant = DEMO_VARIANTS[family]
    out = demo / variant.folder
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name not in _KEPT:
            old.unlink()
    pipeline.save_pretrained(out)
    for name in variant.shared:
        shutil.rmtree(out / name)
    if family == "sd":
        for name in ("vocab.json", "merges.txt"):
            # transformers 5 saves only tokenizer.json; transformers 4 reads these.
            shutil.copyfile(parts / "tokenizer" / name, out / "tokenizer" / name)
    for path in (out / "model_index.json", *out.glob("tokenizer/tokenizer_config.json")):
        # Use the name that both transformers 4 and 5 support.
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for path in out.rglob("*"):
        # safetensors makes files readable by the owner only, and a wheel would keep these permissions.
        path.chmod(0o755 if path.is_dir() else 0o644)
    # Do not publish the names of folders on the training machine.
    for config in out.rglob("config.json"):
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(line for line in lines if "_name_or_path" not in line))


def assemble(parts: Path, checkpoint: Path, embedded: Path) -> tuple[DiffusionPipeline, str]:
    """Return the pipeline with the averaged weights of `checkpoint` in float32, and the name of its family."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    family: str = state["config"]["family"]
    denoiser = FAMILIES[family].build().eval()
    denoiser.load_state_dict(state["average"])
    shared = parts if family == "sd" else embedded
    vae = AutoencoderKL.from_pretrained(shared / "vae").float()
    own = parts / family if FAMILIES[family].own_text else shared
    return _PIPELINES[family](denoiser, vae, own), family


def _sd(unet: torch.nn.Module, vae: AutoencoderKL, text: Path) -> DiffusionPipeline:
    return StableDiffusionPipeline(unet=unet, vae=vae, scheduler=_dpm_solver(), **_clip(text), **_NO_SAFETY)


def _sdxl(unet: torch.nn.Module, vae: AutoencoderKL, text: Path) -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(text / "text_encoder_2").float(),
        tokenizer_2=CLIPTokenizer.from_pretrained(text / "tokenizer_2"),
        scheduler=_dpm_solver(),
        # It was trained on the empty caption for unconditional predictions, not on zeroed embeddings.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _pixart(transformer: torch.nn.Module, vae: AutoencoderKL, text: Path) -> DiffusionPipeline:
    return PixArtAlphaPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=T5EncoderModel.from_pretrained(text / "text_encoder").float(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(text / "tokenizer"),
        scheduler=_dpm_solver(),
    )


def _sd3(transformer: torch.nn.Module, vae: AutoencoderKL, text: Path) -> DiffusionPipeline:
    encoder, tokenizer = embedded_with_projection(text)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _lcm(unet: torch.nn.Module, vae: AutoencoderKL, text: Path) -> DiffusionPipeline:
    scheduler = LCMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", original_inference_steps=SOLVER_STEPS
    )
    return LatentConsistencyModelPipeline(unet=unet, vae=vae, scheduler=scheduler, **_clip(text), **_NO_SAFETY)


def _clip(text: Path) -> dict[str, Any]:
    return {
        "text_encoder": CLIPTextModel.from_pretrained(text / "text_encoder").float(),
        "tokenizer": CLIPTokenizer.from_pretrained(text / "tokenizer"),
    }


def _dpm_solver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        steps_offset=1,
        # The first steps of this noise schedule have almost no signal, and their lambda is out of bounds.
        lambda_min_clipped=-5.1,
    )


_PIPELINES: dict[str, Callable[[torch.nn.Module, AutoencoderKL, Path], DiffusionPipeline]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "pixart": _pixart,
    "sd3": _sd3,
    "lcm": _lcm,
}
