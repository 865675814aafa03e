"""Train the text encoder of the family `sdxl`, whose outputs are the penultimate layer and a projected end token.

The output of the embedded `CLIPTextModel` is its last layer. This encoder has one more layer, and its penultimate layer
learns to reproduce the output of the embedded encoder, so that the weights of the embedded denoiser can be reused.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import workers
from training.data import random_captions, random_scenes
from training.tokenizer import tokenize

logger = logging.getLogger(__name__)


def train_penultimate(embedded: Path, out: Path, *, steps: int, device: str, seed: int, batch: int) -> dict[str, float]:
    """Train for `steps` to reproduce the text encoder in `embedded`, and save to `out`.

    Return the unexplained fractions of the variance, of the hidden states and of the pooled output.
    """
    workers.start(device)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = CLIPTokenizer.from_pretrained(embedded / "tokenizer")
    teacher = CLIPTextModel.from_pretrained(embedded / "text_encoder").float().to(device).eval()
    config = CLIPTextConfig.from_pretrained(embedded / "text_encoder")
    config.num_hidden_layers += 1
    config.dtype = None
    encoder = CLIPTextModelWithProjection(config).to(device).train()
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in teacher.state_dict().items()}
    encoder.load_state_dict(weights, strict=False)
    torch.nn.init.eye_(encoder.text_projection.weight)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    left: dict[str, float] = {}
    for step in range(1, steps + 1):
        captions = random_captions(random_scenes(rng, batch, 0.6), rng)
        captions[0] = ""  # guidance needs the empty caption
        ids = tokenize(tokenizer, captions).to(device)
        with torch.no_grad():
            target = teacher(ids)
        output = encoder(ids, output_hidden_states=True)
        losses = {
            "hidden": _unexplained(output.hidden_states[-2], target.last_hidden_state),
            "pooled": _unexplained(output.text_embeds, target.pooler_output),
        }
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros((), device=device)).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        left = {name: round(float(loss.detach()), 6) for name, loss in losses.items()}
        if step % 50 == 0:
            logger.info("text step %d %s", step, left)
    encoder.eval().save_pretrained(out / "text_encoder_2")
    tokenizer.save_pretrained(out / "tokenizer_2")
    return left


def _unexplained(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean() / target.var()
