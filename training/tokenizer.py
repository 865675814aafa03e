"""A tokenizer with one token for each word of the captions, which spells out all other words."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

from tgate_compile._demo.captions import COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 16  # the longest caption has 14, including start and end token

_OTHER_WORDS = ("a", "an", "on", "at", "the", "with", "background")
_END = "</w>"


def caption_words() -> list[str]:
    relation_words = {word for relation in RELATIONS for word in relation.split()}
    return sorted({*SHAPES, *COLOURS, *SIZES, *POSITIONS, *relation_words, *_OTHER_WORDS})


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build the tokenizer and save it to `folder`, in the file formats of transformers 4 and 5."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = characters + [character + _END for character in characters]
    merges = _merges()
    vocabulary += [left + right for left, right in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    if folder.exists():
        shutil.rmtree(folder)  # an existing tokenizer.json would take precedence over the files written here
    folder.mkdir(parents=True)
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids, padded as by the pipeline, [batch, tokens]."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def _merges() -> list[tuple[str, str]]:
    """Return byte pair merges that turn every caption word into one token.

    Each word is merged from the left: b a -> ba, ba c -> bac, ... An early merge of one word ("r i" of "right") can
    prevent those of another ("triangle"), so orders of the words are tried until all words are merged.
    """
    rng = np.random.default_rng(0)
    for _ in range(1000):
        merges: dict[tuple[str, str], None] = {}
        for word in rng.permutation(caption_words()):
            left, *others = _pieces(str(word))
            for right in others:
                merges.setdefault((left, right))
                left += right
        if all(len(_merged(_pieces(word), list(merges))) == 1 for word in caption_words()):
            return list(merges)
    raise RuntimeError("no order of merges was found that turns every caption word into one token.")


def _pieces(word: str) -> list[str]:
    return [*word[:-1], word[-1] + _END]


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Return the result of byte pair encoding, which applies earlier merges in the list first."""
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in merges]
        if not pairs:
            return pieces
        best = min(pairs, key=merges.index)
        at = list(pairwise(pieces)).index(best)
        pieces = [*pieces[:at], "".join(best), *pieces[at + 2 :]]
