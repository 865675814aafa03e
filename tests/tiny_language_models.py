"""Tiny language and vision models of the real transformers classes, for pipelines that need a text encoder."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.tiny_pipelines import TEXT_DIM, seeded

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "[UNK]",
)  # fmt: skip
_WORDS = ("a", "red", "blue", "cat", "dog")


@functools.cache
def words() -> Any:
    """Return a tokenizer with a token for each of a few words, one for all others, and Qwen's special tokens."""
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL[1:-1]),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


class Reader(Qwen3VLProcessor):  # type: ignore[misc]
    """A processor for text and images, without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def reader() -> Any:
    side = 56
    images = Qwen2VLImageProcessorPil(min_pixels=side**2, max_pixels=side**2)
    return Reader(images, words())


def _language(dim: int, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": len(words()),
        "hidden_size": dim,
        "intermediate_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM}


def _vision_tokens() -> dict[str, Any]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{side}_token_id": f"vision_{side}" for side in ("start", "end")}
    return {name: words().convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


@functools.cache
def qwen_2_5() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_language(TEXT_DIM),
            "rope_parameters": {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            **_VISION,
            "fullatt_block_indexes": [0],
        },
        **_vision_tokens(),
    )
    return seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config), 7)


@functools.cache
def qwen_3() -> Any:
    config = transformers.Qwen3VLConfig(
        text_config={
            **_language(TEXT_DIM),
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            **_VISION,
            "deepstack_visual_indexes": [0],
            "patch_size": 14,
            "num_position_embeddings": 16,
        },
        **_vision_tokens(),
    )
    return seeded(lambda: transformers.Qwen3VLForConditionalGeneration(config), 7)


@functools.cache
def smol() -> Any:
    return seeded(lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_language(16, 4))), 7)


@functools.cache
def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=len(words()), d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return seeded(lambda: transformers.T5EncoderModel(config), 7)


@functools.cache
def siglip() -> Any:
    config = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return seeded(lambda: transformers.SiglipVisionModel(config), 8)


def picture_reader() -> Any:
    return SiglipImageProcessorPil(size={"height": 28, "width": 28})


@functools.cache
def siglip_2() -> Any:
    config = transformers.Siglip2VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=16
    )
    return seeded(lambda: transformers.Siglip2VisionModel(config), 8)


def picture_reader_2() -> Any:
    return Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
