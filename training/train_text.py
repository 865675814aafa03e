"""Train the text encoder to encode, for every caption, each attribute and the object it belongs to."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import workers
from training.data import random_captions, random_scenes
from training.text_heads import TextHeads
from training.tokenizer import MAX_TOKENS, save_tokenizer, tokenize

logger = logging.getLogger(__name__)

WIDTH = 96


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text(
    out: Path, *, steps: int, device: str, seed: int, batch: int, start_from: Path | None = None
) -> dict[str, float]:
    """Train for `steps`, save tokenizer and text encoder in `out`, and return the accuracy of each head.

    The heads classify the encoder's output at the token that ends the caption and at each token after it. Therefore the
    padding, which the denoiser's cross-attention also sees, describes the whole scene. For pairs, the last two tokens,
    which are always padding, must also describe one object and its place each, so that a denoiser need not learn which
    colour belongs to which shape and place.

    If `start_from` is given, training continues from that encoder and keeps its outputs for single objects, so that a
    denoiser trained with it remains usable.
    """
    workers.start(device)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = save_tokenizer(out / "tokenizer")
    encoder = new_text_encoder(tokenizer) if start_from is None else CLIPTextModel.from_pretrained(start_from)
    encoder = encoder.to(device).train()
    before = None if start_from is None else deepcopy(encoder).eval().requires_grad_(False)
    heads = TextHeads(WIDTH).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        # Pairs are harder, and training on them also helps with single objects.
        scenes = random_scenes(rng, batch, 0.6)
        ids = tokenize(tokenizer, random_captions(scenes, rng)).to(device)
        hidden = encoder(ids).last_hidden_state  # [batch, tokens, width]
        ended = ids == tokenizer.eos_token_id  # true from the end on, because the end token is also the padding
        loss = heads.loss(hidden, ended, hidden[:, -2:], scenes)
        if before is not None:
            is_pair = torch.tensor([len(scene.objects) == 2 for scene in scenes], device=device)
            with torch.no_grad():
                previous = before(ids).last_hidden_state[~is_pair]
            loss = loss + 5 * torch.nn.functional.mse_loss(hidden[~is_pair], previous)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("text step %d loss %.4f %s", step, loss, {k: round(v, 3) for k, v in heads.accuracy.items()})
            if before is not None:
                change = float((hidden[~is_pair] - previous).square().mean())
                logger.info("change for single objects: %.5f of variance %.5f", change, float(previous.var()))
    encoder.eval().save_pretrained(out / "text_encoder")
    return heads.accuracy
