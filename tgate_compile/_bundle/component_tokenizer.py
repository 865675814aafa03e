"""A tokenizer as a file of the `tokenizers` library, which cuts and pads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgate_compile._errors import BundleError

#: Tokenized by both libraries when a bundle is written, and what its text encoders are compared on.
TEXTS = (
    "",
    "a red circle on a blue background",
    "  An Ünusual (prompt:1.2), with 日本語, <b>tags</b>, 3.14 & emoji 🙂; " * 20,
)

MSG_OTHER_TOKENS = (
    "The tokenizer {name} makes other tokens of {text!r} in the tokenizers library than in transformers. Nothing has "
    "been written. Please report this."
)


def write_tokenizer(tokenizer: Any, name: str, length: int, path: Path) -> None:
    """Write the fast `tokenizer` of transformers to `path`, for texts of `length` tokens.

    Raises:
        BundleError: the file makes other tokens of some text than `tokenizer` does.
    """
    from tokenizers import Tokenizer

    written = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    written.enable_truncation(length, direction=tokenizer.truncation_side)
    written.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    written.save(str(path))
    for text in TEXTS:
        expected = tokenized(tokenizer, [text], length, "np")
        encoded = Tokenizer.from_file(str(path)).encode(text)
        if [encoded.ids, encoded.attention_mask] != [expected[key][0].tolist() for key in expected]:
            raise BundleError(MSG_OTHER_TOKENS.format(name=name, text=text[:60]))


def tokenized(tokenizer: Any, texts: list[str], length: int, tensors: str) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, both [texts, length], as the pipelines ask for them."""
    made = tokenizer(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors=tensors,
    )
    return {key: made[key] for key in ("input_ids", "attention_mask")}
