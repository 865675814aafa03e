"""Measure the images of an evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tgate_compile._demo.attribute_reader import WEIGHTS, AttributeReader, targets_of
from tgate_compile._demo.captions import IMAGE_SIZE, parse_caption, render
from tgate_compile._errors import ConfigurationError, check_installed, first_line
from tgate_compile.study.evaluation.features import (
    ALEXNET,
    INCEPTION,
    Features,
    Statistics,
    frechet_distance,
    inception_features,
    pixels_of,
    reference_statistics,
    sha256_of,
)
from tgate_compile.study.evaluation.images import Contender, Folder, Item
from tgate_compile.study.evaluation.result import EvaluationRow, decibels, mean_and_error
from tgate_compile.study.tuning.measure import relative_distances
from tgate_compile.study.tuning.request import is_whole

#: Drawn scenes per caption, for the Frechet distance.
DRAWINGS = 8


def are_captions(prompts: Sequence[str]) -> bool:
    """Return whether all prompts are captions that the attribute reader understands."""
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except ValueError:
        return False
    return True


def can_be_read(image: Image.Image) -> bool:
    """Return whether the attribute reader supports images of this size."""
    return image.size == (IMAGE_SIZE, IMAGE_SIZE)


def reader_features(reader: AttributeReader) -> Features:
    """Return the attribute reader's features, which its heads classify."""
    about = {"network": "attribute reader", "sha256": sha256_of(WEIGHTS), "size": IMAGE_SIZE}
    return Features("reader", reader.features, lambda image: image, about)


def right(reader: AttributeReader, pixels: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Return 1.0 for each image (pixels in [0, 1]) that shows everything in its caption, else 0.0; [captions]."""
    return torch.tensor([reader.score(pixels[i : i + 1], [caption])["all"] for i, caption in enumerate(captions)])


@torch.no_grad()
def log_likelihood(reader: AttributeReader, pixels: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Return the reader's log-likelihood of each caption in nats, [captions], given pixels in [0, 1]."""
    scores = {name: head.log_softmax(1) for name, head in reader(pixels).items()}
    targets = [targets_of(parse_caption(caption)) for caption in captions]
    return torch.stack(
        [sum((scores[name][i, at] for name, at in t.items()), torch.tensor(0.0)) for i, t in enumerate(targets)]
    )


def drawings(captions: Sequence[str], each: int, seed: int) -> torch.Tensor:
    """Return `each` drawn scenes per caption, uint8 [each * captions, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    scenes = [parse_caption(caption) for caption in captions]
    return torch.from_numpy(np.stack([render(scene, rng) for _ in range(each) for scene in scenes])).permute(0, 3, 1, 2)


_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The LPIPS distance between images.

    Args:
        alexnet: torchvision's AlexNet weights, with torchvision's names.
    """

    def __init__(self, alexnet: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        own = {name: value for name, value in alexnet.items() if name.startswith("features.")}
        self.load_state_dict(own)
        for index, weight in enumerate(_comparison_weights()):
            self.register_buffer(f"comparison_{index}", weight)  # [1, channels, 1, 1]
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return distances, [batch], between pixels in [0, 1], [batch, 3, height, width]."""
        total = torch.zeros(a.shape[0], device=a.device)
        for index, (x, y) in enumerate(zip(self._activations(a), self._activations(b), strict=True)):
            difference = (_normalized(x) - _normalized(y)) ** 2
            total = total + F.conv2d(difference, self.get_buffer(f"comparison_{index}")).mean((1, 2, 3))
        return total

    def _activations(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        x = (2 * pixels - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _comparison_weights() -> list[torch.Tensor]:
    import torchmetrics.functional.image as image_metrics

    path = Path(image_metrics.__file__).parent / "lpips_models" / "alex.pth"
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return [weights[f"lin{index}.model.1.weight"] for index in range(5)]


MSG_NO_CLIP = "clip: {given} is not a folder with a CLIP model and processor saved by save_pretrained: {reason}."


class Clip:
    """A CLIP model loaded from a folder.

    Args:
        folder: folder with model, tokenizer and image processor, saved by `save_pretrained`.
        device: device to run on.

    Raises:
        ConfigurationError: the folder does not contain a CLIP model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not folder.is_dir():
            raise ConfigurationError(MSG_NO_CLIP.format(given=folder, reason="the folder does not exist"))
        import transformers

        processors: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        try:
            model: Any = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = processors.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise ConfigurationError(MSG_NO_CLIP.format(given=folder, reason=reason)) from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return 100 times the cosine similarity of each image and its prompt, at least 0.

        Long prompts are truncated to CLIP's maximum length. Source: arXiv 2104.08718, with torchmetrics' scale of 100.
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


BATCH = 16
#: With fewer images than features, the covariance is singular and FID mainly depends on the number of images.
ENOUGH_FOR_FID = 2048

MSG_ATTRIBUTES = "attributes=True cannot be used: {reason}."
NO_CLIP = "no CLIP model is available: set clip to a folder with a model saved by save_pretrained"
NO_REFERENCE = "set fid_reference to a folder of real images or to an .npz file with their statistics"
NO_CAPTIONS = "the attribute reader supports only captions of the embedded pipeline and images of 64x64 pixels"
NO_LATENTS = "the final latents were not kept"
TOO_FEW = "at least two images are needed"
REMARK_FEW = (
    "FID of {count} images: FID decreases with the number of images, so only values for equal numbers can be compared. "
    "The paper uses 10,000."
)


@dataclass(frozen=True)
class Instruments:
    """The networks and reference data to measure with; see `evaluate`.

    Attributes:
        fid_weights: file with Inception weights.
        fid_reference: folder of real images, or file with statistics.
        fid_size: side length of the images for FID, in pixels.
        lpips_weights: file with AlexNet weights.
        clip: folder with a CLIP model.
        attributes: whether to use the attribute reader; None: if it supports prompts and images.
    """

    fid_weights: Path | None = None
    fid_reference: Path | None = None
    fid_size: int = 256
    lpips_weights: Path | None = None
    clip: Path | None = None
    attributes: bool | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.fid_size) or self.fid_size < 16:
            raise ConfigurationError(f"fid_size must be an integer of at least 16 (pixels), but got {self.fid_size!r}.")
        check_installed("torchmetrics", extra="evaluate", what="An evaluation")

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before any work is done, that everything can be used.

        Raises:
            ConfigurationError: a file does not exist, or the prompts are not captions of the embedded model.
        """
        INCEPTION.find(self.fid_weights)
        ALEXNET.find(self.lpips_weights)
        if self.fid_reference is not None and not self.fid_reference.exists():
            raise ConfigurationError(f"fid_reference: {self.fid_reference} does not exist.")
        if self.attributes and not are_captions(prompts):
            raise ConfigurationError(MSG_ATTRIBUTES.format(reason="the prompts are not captions of the embedded model"))
        if self.clip is not None:
            Clip(self.clip, torch.device("cpu"))

    def as_dict(self) -> dict[str, Any]:
        """Return everything the numbers depend on, as plain data."""
        inception, alexnet = INCEPTION.find(self.fid_weights), ALEXNET.find(self.lpips_weights)
        return {
            "fid_weights_sha256": None if inception is None else sha256_of(inception),
            "fid_reference": None if self.fid_reference is None else str(self.fid_reference),
            "fid_size": self.fid_size,
            "lpips_weights_sha256": None if alexnet is None else sha256_of(alexnet),
            "clip": None if self.clip is None else str(self.clip),
            "attributes": self.attributes,
        }


class Measurer:
    """Measure contenders; the plain pipeline must be measured first.

    Args:
        folder: folder with all images.
        items: images of each contender.
        prompts: the prompts.
        instruments: what to measure with.
        device: device to run on.
        plain: the contender that the others are compared with.
        key: key of the images; stored statistics are reused while it is unchanged.
    """

    def __init__(
        self,
        folder: Folder,
        items: Sequence[Item],
        prompts: Sequence[str],
        instruments: Instruments,
        device: torch.device,
        plain: Contender,
        key: str,
    ) -> None:
        self._folder = folder
        self._items = items
        self._prompts = [prompts[item.prompt] for item in items]
        self._instruments = instruments
        self._device = device
        self._plain = plain
        self._key = key
        self.not_measured: dict[str, str] = {}
        self.remarks: list[str] = []
        self.about: dict[str, Any] = {}
        self._of_plain: dict[str, Statistics] = {}
        first = folder.load(plain, items[0])
        self.about["image_size"] = list(first.size)
        self._reads = self._can_read(first)
        self._lpips = self._load_lpips()
        self._clip = None if instruments.clip is None else Clip(instruments.clip, device)
        if self._clip is None:
            self.not_measured["clip_score"] = NO_CLIP
        self._features = self._load_inception()

    def _can_read(self, image: Image.Image) -> bool:
        if self._instruments.attributes is False:
            return False
        readable = are_captions(self._prompts) and can_be_read(image)
        if not readable:
            if self._instruments.attributes:
                raise ConfigurationError(
                    MSG_ATTRIBUTES.format(reason=f"images have {image.width}x{image.height} pixels")
                )
            self.not_measured["accuracy"] = NO_CAPTIONS
        return readable

    def _load_lpips(self) -> Lpips | None:
        path = ALEXNET.find(self._instruments.lpips_weights)
        if path is None:
            self.not_measured["lpips"] = ALEXNET.absent
            return None
        try:
            network = Lpips(ALEXNET.load(path))
        except RuntimeError as error:
            raise ALEXNET.refused(path, error) from error
        return network.eval().requires_grad_(False).to(self._device)

    def _load_inception(self) -> Features | None:
        path = INCEPTION.find(self._instruments.fid_weights)
        if path is None:
            self.not_measured["fid"] = self.not_measured["fid_to_plain"] = INCEPTION.absent
            return None
        if len(self._items) < 2:
            self.not_measured["fid"] = self.not_measured["fid_to_plain"] = TOO_FEW
            return None
        if len(self._items) < ENOUGH_FOR_FID:
            self.remarks.append(REMARK_FEW.format(count=len(self._items)))
        features = inception_features(path, self._instruments.fid_size, self._device)
        self.about["fid_features"] = dict(features.about)
        return features

    @cached_property
    def _reader(self) -> Any:
        from tgate_compile._demo.attribute_reader import AttributeReader

        return AttributeReader.load()

    @cached_property
    def _reference(self) -> Statistics | None:
        """The statistics of the real images."""
        given = self._instruments.fid_reference
        if given is None or self._features is None:
            self.not_measured.setdefault("fid", NO_REFERENCE)
            return None
        statistics = reference_statistics(given, self._features, self._folder.statistics)
        self.about["fid_reference"] = {"count": statistics.count, **statistics.about}
        return statistics

    @cached_property
    def _drawn(self) -> Statistics:
        """The statistics of drawn scenes of the same captions."""
        images = drawings(self._prompts, DRAWINGS, seed=0).float() / 255
        return Statistics.of(self._reader.features(images))

    def measure(self, contender: Contender) -> EvaluationRow:
        """Return all measures of one contender."""
        strips, measures = self._files(contender)
        measures |= self._per_image(contender)
        measures |= self._sets(contender)
        return EvaluationRow(contender.label, contender.schedule, contender.steps, len(self._items), strips, measures)

    def _files(self, contender: Contender) -> tuple[dict[str, int], dict[str, float | None]]:
        texts = [self._folder.load(contender, item).info for item in self._items]
        costs = [float(text["cost"]) for text in texts if text.get("cost")]
        cost = math.fsum(costs) / len(costs) if costs else 1.0
        # The stored cost is relative to the plain pipeline with the same number of steps.
        measures: dict[str, float | None] = {"cost": cost * contender.steps / self._plain.steps}
        return dict(Counter(str(text["strip"]) for text in texts)), measures

    def _per_image(self, contender: Contender) -> dict[str, float | None]:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        values: dict[str, list[float]] = {name: [] for name in ("psnr", "ssim", "drift")}
        identical = 0
        rights: list[tuple[float, float]] = []
        for items, prompts, images, plain in self._batches(contender):
            pixels, of_plain = pixels_of(images), pixels_of(plain)
            for error in (pixels - of_plain).double().square().mean((1, 2, 3)).tolist():
                identical += error == 0.0
                ratio = decibels(error)
                values["psnr"] += [] if ratio is None else [ratio]
            found = ssim(pixels, of_plain, data_range=1.0, reduction="none")
            assert isinstance(found, torch.Tensor)
            values["ssim"] += found.tolist()
            if self._lpips is not None:
                distances = self._lpips(pixels.to(self._device), of_plain.to(self._device))
                values.setdefault("lpips", []).extend(distances.tolist())
            if self._clip is not None:
                values.setdefault("clip_score", []).extend(self._clip.score(images, prompts))
            if self._reads:
                pairs = (right(self._reader, x, prompts).tolist() for x in (pixels, of_plain))
                rights += zip(*pairs, strict=True)
            for item in items:
                latents, reference = (self._folder.load_latents(c, item) for c in (contender, self._plain))
                if latents is not None and reference is not None:
                    values["drift"] += relative_distances(latents[None], reference[None])
        if not values["drift"]:
            del values["drift"]
            self.not_measured["drift"] = NO_LATENTS
        measures: dict[str, float | None] = {"identical": identical}
        for name, numbers in values.items():
            measures |= mean_and_error([number for number in numbers if math.isfinite(number)], name)
        if "drift" in values:
            measures["drift_worst"] = max(values["drift"]) if all(map(math.isfinite, values["drift"])) else None
        if self._reads:
            measures |= mean_and_error([now for now, _ in rights], "accuracy")
            measures |= mean_and_error([now - before for now, before in rights], "accuracy_minus_plain")
            measures["lost"] = sum(now < before for now, before in rights)
            measures["gained"] = sum(now > before for now, before in rights)
        return measures

    def _sets(self, contender: Contender) -> dict[str, float | None]:
        measures: dict[str, float | None] = {}
        if self._features is not None:
            own = self._statistics(self._features, contender)
            if self._reference is not None:
                measures["fid"] = frechet_distance(own, self._reference)
            measures["fid_to_plain"] = self._to_plain(self._features, contender, own)
        if self._reads and len(self._items) > 1:
            features = reader_features(self._reader)
            own = self._statistics(features, contender)
            measures["frechet_to_drawings"] = frechet_distance(own, self._drawn)
            measures["frechet_to_plain"] = self._to_plain(features, contender, own)
        return measures

    def _to_plain(self, features: Features, contender: Contender, own: Statistics) -> float:
        if contender == self._plain:
            self._of_plain[features.name] = own
            return 0.0
        return frechet_distance(own, self._of_plain[features.name])

    def _statistics(self, features: Features, contender: Contender) -> Statistics:
        about = {
            "contender": contender.as_dict(),
            "items": [item.file_name for item in self._items],
            "key": self._key,
        }
        return features.statistics(
            self._folder.statistics, contender.file_name, lambda: self._images(contender, self._items), about
        )

    def _images(self, contender: Contender, items: Iterable[Item]) -> Iterator[Image.Image]:
        for item in items:
            yield self._folder.load(contender, item)

    def _batches(
        self, contender: Contender
    ) -> Iterator[tuple[Sequence[Item], list[str], list[Image.Image], list[Image.Image]]]:
        for at in range(0, len(self._items), BATCH):
            items, prompts = self._items[at : at + BATCH], self._prompts[at : at + BATCH]
            yield items, prompts, list(self._images(contender, items)), list(self._images(self._plain, items))
