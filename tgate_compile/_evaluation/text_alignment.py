"""How well images follow their prompts, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tgate_compile._errors import ConfigurationError

MSG_NO_CLIP = "clip: {given} is no folder with a CLIP model and its processor, as save_pretrained writes it: {reason}."


class Clip:
    """A CLIP model from a folder.

    Args:
        folder: as `save_pretrained` writes it, model, tokenizer and image processor.
        device: to run on.

    Raises:
        ConfigurationError: it holds none.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not folder.is_dir():
            raise ConfigurationError(MSG_NO_CLIP.format(given=folder, reason="there is no such folder"))
        import transformers

        processors: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        try:
            model: Any = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = processors.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(MSG_NO_CLIP.format(given=folder, reason=reason)) from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """100 times the cosine of image and text, at least 0, for each image. Long prompts are cut, as CLIP has to.

        Source: arXiv 2104.08718; with torchmetrics' scale of 100.
        """
        texts = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        pixels = self._processor(list(images), return_tensors="pt")["pixel_values"]
        found = self._model(
            input_ids=texts["input_ids"].to(self._device),
            attention_mask=texts["attention_mask"].to(self._device),
            pixel_values=pixels.to(self._device),
        )
        cosine = torch.cosine_similarity(found.image_embeds.float(), found.text_embeds.float(), dim=-1)
        scores: list[float] = (100 * cosine).clamp_min(0.0).tolist()
        return scores
