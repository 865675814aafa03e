"""Puts the trained parts together into the folder that the package ships."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from training.denoisers import FAMILIES

_KEPT = {"README.md", "attribute_reader.safetensors"}  # not made here


def export_pipeline(parts: Path, checkpoint: Path, out: Path) -> None:
    """Writes the averaged weights of `checkpoint`, with the other parts from `parts`, to `out`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["config"]["family"] != "sd":
        raise ValueError(f"only the family 'sd' becomes a StableDiffusionPipeline, got {state['config']['family']!r}.")
    unet = FAMILIES["sd"].build()
    unet.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            steps_offset=1,
            # The first steps of this noise schedule have next to no signal; their lambda is out of bounds.
            lambda_min_clipped=-5.1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        torch.nn.Module.to(part, torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name not in _KEPT:
            old.unlink()
    pipeline.save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):
        # transformers 5 saves only tokenizer.json; transformers 4 reads these.
        shutil.copyfile(parts / "tokenizer" / name, out / "tokenizer" / name)
    for path in out.rglob("*"):
        # safetensors writes for the owner only, but a wheel keeps the permissions.
        path.chmod(0o755 if path.is_dir() else 0o644)
    # The names of folders on the machine that trained are nobody's business.
    for config in out.rglob("config.json"):
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(line for line in lines if "_name_or_path" not in line))
