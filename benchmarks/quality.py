"""Measure the cost of schedules and their effect on image quality, on the embedded pipeline.

    python benchmarks/quality.py --out benchmarks/results/quality_embedded.json
    python benchmarks/quality.py --out benchmarks/results/quality_embedded.json --only "tgate *" "drop *"

Every contender in `quality_schedules.py` draws the same held-out captions from the same noise. For each image, the
attribute reader decides whether it shows everything in the caption, and how likely that is. The results also contain
the Frechet distance of the reader's features to drawn scenes of the same captions and to the plain pipeline's images,
the PSNR to the plain pipeline's images, and the denoiser's multiply-accumulates (in linear and convolution layers,
which is the paper's convention) relative to the plain pipeline.

All contenders use the same captions, so differences can be computed image by image. Their standard errors are much
smaller than those of the accuracies themselves.

The file is written after each contender. Contenders that it already contains are not measured again. A file with other
settings is an error.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from quality_schedules import CONTENDERS, Contender
from torchmetrics.functional.image import peak_signal_noise_ratio

import tgate_compile
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from tgate_compile.study.evaluation.features import Statistics, frechet_distance
from tgate_compile.study.evaluation.measure import drawings, log_likelihood, right

logger = logging.getLogger(__name__)

MSG_OTHER_SETTINGS = "{path} has results of other settings:\n  {found}\nexpected:\n  {asked}\nChoose another --out."


@dataclass(frozen=True)
class Settings:
    """The settings shared by all contenders.

    Attributes:
        pairs: number of captions with two objects.
        singles: number of captions with one object.
        caption_seed: seed of the captions, `held_out_captions(n, caption_seed, objects)`.
        noise_seed: image i uses the generator `torch.Generator().manual_seed(noise_seed * 1_000_000 + i)`.
        steps: number of inference steps, unless the contender sets another.
        guidance: guidance scale.
        drawings: number of drawn scenes per caption, for the Frechet distance.
    """

    pairs: int
    singles: int
    caption_seed: int
    noise_seed: int = 1
    steps: int = 25
    guidance: float = 5.0
    drawings: int = 8

    @property
    def captions(self) -> list[str]:
        """The captions with one object, followed by those with two."""
        return [
            *held_out_captions(self.singles, self.caption_seed, objects=1),
            *held_out_captions(self.pairs, self.caption_seed, objects=2),
        ]


@dataclass(frozen=True)
class Drawn:
    """The images of a contender and their cost.

    Attributes:
        images: images, uint8 [captions, 3, 64, 64].
        strips: number of captions by strip.
        macs: multiply-accumulates of all images together, in linear and convolution layers.
        macs_total: `macs` plus the matrix products inside attention.
    """

    images: torch.Tensor
    strips: dict[str, int]
    macs: int
    macs_total: int


class Judge:
    """Compare images with their captions, with drawn scenes, and with the plain pipeline's images."""

    def __init__(self, settings: Settings) -> None:
        self._captions = settings.captions
        self._singles = settings.singles
        self._reader = AttributeReader.load()
        self._of_drawings = self._statistics(drawings(self._captions, settings.drawings, seed=0))
        # The distance of the same number of perfect images.
        self.floor = self._distance(self._of_drawings, self._statistics(drawings(self._captions, 1, seed=1)))
        self._plain_images: torch.Tensor | None = None

    def set_plain(self, images: torch.Tensor) -> None:
        """Set the images that the others are compared with."""
        self._plain_images = images
        self._of_plain = self._statistics(images)
        self._plain_right = self._right(images)
        self._plain_likelihood = self._likelihood(images)

    def __call__(self, images: torch.Tensor) -> dict[str, Any]:
        """Return the measurements of `images` as plain data for JSON."""
        assert self._plain_images is not None
        pixels = images.float() / 255
        right, likelihood = self._right(images), self._likelihood(images)
        psnr = peak_signal_noise_ratio(
            images.float(), self._plain_images.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        psnr = psnr[psnr.isfinite()]  # it is infinite for identical images
        own = self._statistics(images)
        result: dict[str, Any] = {}
        for kind, rows in (("single", slice(self._singles)), ("pair", slice(self._singles, None))):
            score = self._reader.score(pixels[rows], self._captions[rows])
            result[kind] = {
                "accuracy": {name: round(share, 4) for name, share in score.items()},
                "accuracy_se": _standard_error(right[rows]),
                "accuracy_minus_plain": _mean(right[rows] - self._plain_right[rows]),
                "accuracy_minus_plain_se": _standard_error(right[rows] - self._plain_right[rows]),
                "lost": int((right[rows] < self._plain_right[rows]).sum()),
                "gained": int((right[rows] > self._plain_right[rows]).sum()),
                "log_likelihood": _mean(likelihood[rows]),
                "log_likelihood_minus_plain": _mean(likelihood[rows] - self._plain_likelihood[rows]),
                "log_likelihood_minus_plain_se": _standard_error(likelihood[rows] - self._plain_likelihood[rows]),
                "right": "".join(str(int(r)) for r in right[rows]),
            }
        return result | {
            "frechet_to_drawings": self._distance(self._of_drawings, own),
            "frechet_to_plain": self._distance(self._of_plain, own),
            "psnr_to_plain": _mean(psnr) if len(psnr) else None,
            "psnr_to_plain_se": _standard_error(psnr) if len(psnr) else None,
        }

    def _right(self, images: torch.Tensor) -> torch.Tensor:
        """Return 1.0 for each image that shows everything in its caption, else 0.0; [captions]."""
        return right(self._reader, images.float() / 255, self._captions)

    def _likelihood(self, images: torch.Tensor) -> torch.Tensor:
        """Return the reader's log-likelihood of each caption in nats, [captions]."""
        return log_likelihood(self._reader, images.float() / 255, self._captions)

    def _statistics(self, images: torch.Tensor) -> Statistics:
        """Return the statistics of the reader's features."""
        return Statistics.of(self._reader.features(images.float() / 255))

    def _distance(self, a: Statistics, b: Statistics) -> float:
        return round(frechet_distance(a, b), 4)


def _mean(values: torch.Tensor) -> float:
    return round(float(values.mean()), 4)


def _standard_error(values: torch.Tensor) -> float:
    return round(float(values.std()) / math.sqrt(len(values)), 4) if len(values) > 1 else math.nan


def draw(contender: Contender, settings: Settings) -> Drawn:
    """Make all images of a contender. Image i does not depend on the batch size, except for rounding."""
    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
    call |= contender.call
    if contender.options is not None:
        options = dict(contender.options)
        if "cache_dtype" in options:  # given by name, because the results are JSON
            options["cache_dtype"] = getattr(torch, options["cache_dtype"])
        tgate_compile.optimize(pipe, **options, backend="eager")
    captions, images = settings.captions, []
    strips: dict[str, int] = {}
    macs = macs_total = 0
    for at in range(0, len(captions), contender.batch):
        batch = captions[at : at + contender.batch]
        noise = [torch.Generator().manual_seed(settings.noise_seed * 1_000_000 + at + i) for i in range(len(batch))]
        images.append(pipe(batch, generator=noise, output_type="pt", **call).images)
        if contender.options is None:
            strip = "F" * call["num_inference_steps"]
        else:
            description = tgate_compile.describe(pipe)
            strip = description.strip
            variants = {(v.name, v.batch): v for v in description.variants}
            for (_, name), letter in zip(description.last_steps, strip, strict=True):
                variant = variants[name, len(batch) * (2 if letter.isupper() else 1)]
                macs, macs_total = macs + variant.macs, macs_total + variant.macs_total
        strips[strip] = strips.get(strip, 0) + len(batch)
    if contender.options is None:
        layers, total = full_step_macs()
        steps = len(captions) * call["num_inference_steps"]
        macs, macs_total = steps * layers, steps * total
    return Drawn((torch.cat(images) * 255).round().to(torch.uint8), strips, macs, macs_total)


@functools.cache
def full_step_macs() -> tuple[int, int]:
    """Return the multiply-accumulates of a guided step of one image: of layers only, and including attention."""
    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, None, guidance_step=1, backend="eager")
    pipe("a large red circle on a blue background", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    (full,) = tgate_compile.describe(pipe).variants
    return full.macs, full.macs_total


def measure(path: Path, contenders: Sequence[Contender], settings: Settings, images: Path | None = None) -> None:
    """Measure the contenders that `path` does not contain yet, and write the file after each.

    Args:
        path: JSON file with the results.
        contenders: contenders to measure, in addition to the plain pipeline, which the others are compared with.
        settings: settings shared by all contenders.
        images: folder in which to keep the images, with one file per contender. The images of the plain pipeline are
            read from it, if present.

    Raises:
        SystemExit: the file was made with other settings.
    """
    results = _results(path, settings)
    rows: dict[str, Any] = results["rows"]
    plain = CONTENDERS[0]
    missing = [contender for contender in contenders if not _is_in(rows, contender)]
    rows |= {c.name: rows[c.name] | _place(c) for c in CONTENDERS if c.name in rows}
    if not missing:
        logger.info("nothing to do: %s contains all contenders", path)
        return
    judge = Judge(settings)
    command = (
        f"python benchmarks/quality.py --captions {settings.pairs} --singles {settings.singles} "
        f"--caption-seed {settings.caption_seed} --steps {settings.steps}"
    )
    results |= {"command": command, "frechet_floor": judge.floor, "environment": _environment()}
    layers, total = full_step_macs()
    everything = len(settings.captions) * settings.steps
    folder = None if images is None else images / f"{settings.pairs} pairs, caption seed {settings.caption_seed}"
    kept = None if folder is None else folder / f"{plain.name}.npy"
    if kept is not None and kept.exists() and _is_in(rows, plain):
        judge.set_plain(torch.from_numpy(np.load(kept)))
    else:
        missing = [plain, *(contender for contender in missing if contender is not plain)]
    for contender in missing:
        drawn = draw(contender, settings)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{contender.name}.npy", drawn.images.numpy())
        if contender is plain:
            judge.set_plain(drawn.images)
        row = {
            **_place(contender),
            **_arguments(contender),
            "macs": round(drawn.macs / (everything * layers), 4),
            "macs_with_attention": round(drawn.macs_total / (everything * total), 4),
            "strips": drawn.strips,
            **judge(drawn.images),
        }
        rows[contender.name] = row
        # In the order of CONTENDERS, followed by contenders that it no longer contains.
        results["rows"] = {c.name: rows[c.name] for c in CONTENDERS if c.name in rows} | rows
        _write(path, results)
        logger.info("%s", summary(contender.name, row))


def summary(name: str, row: dict[str, Any]) -> str:
    """Return a line for the log."""
    pair, single = row["pair"], row["single"]
    return (
        f"{name:28} macs {row['macs']:.3f}  pairs {pair['accuracy']['all']:.3f} "
        f"({pair['accuracy_minus_plain']:+.3f} +- {pair['accuracy_minus_plain_se']:.3f}, "
        f"likelihood {pair['log_likelihood_minus_plain']:+.4f} +- {pair['log_likelihood_minus_plain_se']:.4f})  "
        f"singles {single['accuracy']['all']:.3f}  frechet {row['frechet_to_drawings']:.2f}  "
        f"psnr {row['psnr_to_plain']}"
    )


def _results(path: Path, settings: Settings) -> dict[str, Any]:
    asked = asdict(settings)
    if not path.exists():
        return {"settings": asked, "rows": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if results["settings"] != asked:
        raise SystemExit(MSG_OTHER_SETTINGS.format(path=path, found=results["settings"], asked=asked))
    return results


def _place(contender: Contender) -> dict[str, str]:
    return {"method": contender.method, "label": contender.label}


def _arguments(contender: Contender) -> dict[str, Any]:
    options = None if contender.options is None else dict(contender.options)
    return {"options": options, "call": dict(contender.call), "batch": contender.batch}


def _is_in(rows: dict[str, Any], contender: Contender) -> bool:
    row = rows.get(contender.name, {})
    return all(name in row and row[name] == value for name, value in _arguments(contender).items())


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write the file atomically, so that an interrupted run leaves the previous results."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _environment() -> dict[str, str]:
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return versions | {"tgate_compile": tgate_compile.__version__, "device": "cpu"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results; extended if it exists")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="contenders to measure, in this order; may contain *"
    )
    parser.add_argument("--captions", type=int, default=256, help="number of captions with two objects")
    parser.add_argument("--singles", type=int, help="number of captions with one object (default: half as many)")
    parser.add_argument("--caption-seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--images", type=Path, help="folder in which to keep the images")
    options = parser.parse_args(arguments)
    by_name = {c.name: c for pattern in options.only for c in CONTENDERS if fnmatch(c.name, pattern)}
    if not by_name:
        parser.error(f"no contender matches {' or '.join(options.only)}; choose from {[c.name for c in CONTENDERS]}")
    singles = max(options.captions // 2, 1) if options.singles is None else options.singles
    settings = Settings(options.captions, singles, options.caption_seed, steps=options.steps)
    measure(options.out, list(by_name.values()), settings, options.images)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
