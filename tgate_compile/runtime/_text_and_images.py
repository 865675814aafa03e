"""Encode prompts and decode latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tgate_compile._errors import BundleError
from tgate_compile.bundle.manifest import Components, Source, TextEncoder, Tokenizer, VaeDecoder
from tgate_compile.runtime._noise import Array
from tgate_compile.runtime._session import Session, Settings, ort_value

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: The encodings of some prompts, by source; the first dimension is the number of prompts.
Encoded = dict[Source, Array]


class Prompts:
    """The text encoders of a bundle, with their tokenizers."""

    def __init__(self, components: Components, folder: Path, settings: Settings) -> None:
        self._encoders = [_Encoder(spec, folder, settings) for spec in components.text_encoders]
        self._zeros = components.negative == "zeros"

    def encoded(self, texts: Sequence[str]) -> Encoded:
        """Return `hidden_states`, [texts, tokens, dim], and `attention_mask` and `pooled` if the encoders have them."""
        parts = [encoder.encoded(texts) for encoder in self._encoders]
        joined = {source: value for part in parts for source, value in part.items()}
        for source in joined.keys() & {"hidden_states", "pooled"}:
            joined[source] = np.concatenate([part[source] for part in parts if source in part], axis=-1)
        return joined

    def negative(self, texts: Sequence[str] | None, prompts: Encoded) -> Encoded:
        """Return the encodings of negative prompts; None stands for missing ones, with the shapes of `prompts`."""
        if texts is not None:
            return self.encoded(texts)
        if not self._zeros:
            return self.encoded([""] * len(prompts["hidden_states"]))
        return {source: np.zeros_like(value) for source, value in prompts.items()}


class _Encoder:
    def __init__(self, spec: TextEncoder, folder: Path, settings: Settings) -> None:
        from tokenizers import Tokenizer as Library

        self._spec = spec
        self._path = folder / spec.tokenizer.file
        try:
            self._tokenizer = Library.from_file(str(self._path))
        except Exception as error:  # the tokenizers library raises plain exceptions
            raise BundleError(f"{self._path} is not a file of the tokenizers library: {error}.") from error
        self._session = Session(folder / spec.file, spec.inputs, spec.outputs, settings)

    def encoded(self, texts: Sequence[str]) -> Encoded:
        tokens = self._tokens(texts)
        inputs = {spec.name: ort_value(tokens[spec.name], spec) for spec in self._spec.inputs}
        outputs = self._session.run(inputs)
        result: Mapping[str, Array] = {
            spec.name: value.numpy() for spec, value in zip(self._spec.outputs, outputs, strict=True)
        }
        encoded: Encoded = {"hidden_states": result["hidden_states"]}
        if "pooled" in result:
            encoded["pooled"] = result["pooled"]
        if "attention_mask" in inputs:
            encoded["attention_mask"] = tokens["attention_mask"]
        return encoded

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, Array]:
        """Return `input_ids` and `attention_mask`, both [texts, tokens]."""
        spec: Tokenizer = self._spec.tokenizer
        encodings = self._tokenizer.encode_batch([text.lower().strip() if spec.lower_case else text for text in texts])
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.overflowing:
                logger.warning(
                    "This prompt is truncated, because it has more than the %d tokens that the text encoder supports. "
                    "It ends with %r.",
                    spec.length,
                    text[-60:],
                )
            if len(encoding.ids) != spec.length:
                raise BundleError(
                    f"{self._path} encodes a text as {len(encoding.ids)} tokens, but the manifest says {spec.length}."
                )
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        return {"input_ids": ids, "attention_mask": np.array([encoding.attention_mask for encoding in encodings])}


class Decoder:
    """The VAE decoder of a bundle."""

    def __init__(self, spec: VaeDecoder, folder: Path, settings: Settings) -> None:
        self._spec = spec
        self._session = Session(folder / spec.file, spec.inputs, spec.outputs, settings)

    def __call__(self, latents: Array) -> Array:
        """Decode `latents`, [images, channels, h, w], to images in [0, 1], float32, [images, height, width, 3]."""
        (spec,) = self._spec.inputs
        scaled = latents / self._spec.scaling_factor + self._spec.shift_factor
        (images,) = self._session.run({spec.name: ort_value(scaled, spec)})
        black, white = self._spec.image_range
        shown: Array = ((images.numpy().astype(np.float32) - black) / (white - black)).clip(0, 1)
        return shown.transpose(0, 2, 3, 1)


def pil_images(images: Array) -> list[Image]:
    """Convert `images`, [images, height, width, 3], with values in [0, 1], to PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in (images * 255).round().astype(np.uint8)]
