"""Train the text encoder of the family `pixart`, a T5 encoder whose tokens, without padding, describe the scene."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training import workers
from training.data import random_captions, random_scenes
from training.text_heads import TextHeads
from training.tokenizer import MAX_TOKENS, caption_words
from training.train_text import WIDTH

logger = logging.getLogger(__name__)

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def new_word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per caption word and for the comma; like T5's, it only adds an end token."""
    words = {word: number for number, word in enumerate([_PAD, _END, _UNKNOWN, ",", *caption_words()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, words[_END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        model_max_length=MAX_TOKENS,
    )


def new_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_t5(out: Path, *, steps: int, device: str, seed: int, batch: int) -> dict[str, float]:
    """Train for `steps`, save tokenizer and encoder in `out`, and return the accuracy of each head.

    The denoiser never sees the padding, so every real token must describe the whole scene. For pairs, the last two
    tokens, a word and the end token, must also describe one object each.
    """
    workers.start(device)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = new_word_tokenizer()
    encoder = new_t5(tokenizer).to(device).train()
    heads = TextHeads(WIDTH).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        scenes = random_scenes(rng, batch, 0.6)
        ids, mask = (x.to(device) for x in tokenize_words(tokenizer, random_captions(scenes, rng)))
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [batch, tokens, width]
        last = mask.sum(1) - 1  # the end token
        rows = torch.arange(len(ids), device=device)
        slots = torch.stack([hidden[rows, last - 1], hidden[rows, last]], dim=1)
        loss = heads.loss(hidden, mask.bool(), slots, scenes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("t5 step %d loss %.4f %s", step, loss, {k: round(v, 3) for k, v in heads.accuracy.items()})
    encoder.eval().save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    return heads.accuracy


def tokenize_words(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, padded as by the pipeline, [batch, tokens] each."""
    out = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return out.input_ids, out.attention_mask
