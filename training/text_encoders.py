"""The text encoders of the families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from tgate_compile._demo import DEMO_VARIANTS
from training.tokenizer import tokenize


@dataclass(frozen=True)
class EncodedText:
    """Encoded captions, the text inputs of a denoiser."""

    hidden: torch.Tensor  # [captions, tokens, width]
    pooled: torch.Tensor  # [captions, width], output at the token that ends the caption
    mask: torch.Tensor  # [captions, tokens], false for tokens that must be ignored

    def __getitem__(self, which: torch.Tensor) -> EncodedText:
        return EncodedText(self.hidden[which], self.pooled[which], self.mask[which])


Encode = Callable[[list[str]], EncodedText]


def clip(folder: Path, device: str) -> Encode:
    """Return the encoder of the family `sd`, which uses the last hidden state."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def encode(captions: list[str]) -> EncodedText:
        ids = tokenize(tokenizer, captions).to(device)
        out = encoder(ids)
        return EncodedText(out.last_hidden_state, out.pooler_output, torch.ones_like(ids, dtype=torch.bool))

    return _in_parts(encode)


def clip_with_projection(folder: Path, device: str) -> Encode:
    """Return the encoder of the family `sdxl`, which uses the penultimate hidden state and the projected end token."""
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").float()
    return _with_projection(encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer_2"), device)


def twice_with_projection(folder: Path, device: str) -> Encode:
    """Return the encoder of the family `sd3`, the output of both CLIP encoders side by side, without T5.

    Both are the text encoder of the embedded `sdxl`, which is next to the embedded pipeline in `folder`.
    """
    encode_once = _with_projection(*embedded_with_projection(folder), device)

    def encode(captions: list[str]) -> EncodedText:
        once = encode_once(captions)
        return EncodedText(torch.cat([once.hidden] * 2, dim=-1), torch.cat([once.pooled] * 2, dim=-1), once.mask)

    return encode


def embedded_with_projection(folder: Path) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """Return text encoder and tokenizer of the embedded `sdxl`, which is next to the embedded pipeline in `folder`."""
    own = folder.parent / DEMO_VARIANTS["sdxl"].folder
    encoder: CLIPTextModelWithProjection = CLIPTextModelWithProjection.from_pretrained(own / "text_encoder_2")
    return encoder.float(), CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _with_projection(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, device: str) -> Encode:
    encoder = encoder.to(device).eval()

    def encode(captions: list[str]) -> EncodedText:
        ids = tokenize(tokenizer, captions).to(device)
        out = encoder(ids, output_hidden_states=True)
        return EncodedText(out.hidden_states[-2], out.text_embeds, torch.ones_like(ids, dtype=torch.bool))

    return _in_parts(encode)


def t5(folder: Path, device: str) -> Encode:
    """Return the encoder of the family `pixart`, which masks the padding."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").float().to(device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")

    def encode(captions: list[str]) -> EncodedText:
        out = tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).to(device)
        hidden = encoder(input_ids=out.input_ids, attention_mask=out.attention_mask).last_hidden_state
        mask = out.attention_mask.bool()
        return EncodedText(hidden, hidden[torch.arange(len(hidden)), mask.sum(1) - 1], mask)

    return _in_parts(encode)


def _in_parts(encode: Encode) -> Encode:
    @torch.no_grad()
    def encode_all(captions: list[str]) -> EncodedText:
        parts = [encode(captions[at : at + 256]) for at in range(0, len(captions), 256)]
        return EncodedText(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.mask for part in parts]),
        )

    return encode_all
