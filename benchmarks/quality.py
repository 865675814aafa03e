"""What schedules cost and what they do to the images, on the embedded pipeline.

    python benchmarks/quality.py --out benchmarks/results/quality_embedded.json
    python benchmarks/quality.py --out benchmarks/results/quality_embedded.json --only "tgate *" "drop *"

Every contender of `quality_schedules.py` draws the same held-out captions from the same noise. The attribute reader
judges each image: whether everything the caption says is there, and how likely the reader holds it. Beside that stand
the Frechet distance of the reader's features, to drawn scenes of the same captions and to the plain pipeline's images;
the PSNR to the plain pipeline's images; and the denoiser's multiply-accumulates (linear and convolution layers, the
paper's convention), the plain pipeline's being 1.

All contenders have the same captions, so that differences are taken image by image: their standard errors are far
smaller than those of the accuracies themselves.

The file is written after each contender. Those it has already are not measured again; a file of other settings is
refused.
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

MSG_OTHER_SETTINGS = "{path} has results of other settings:\n  {found}\nasked for:\n  {asked}\nGive another --out."


@dataclass(frozen=True)
class Settings:
    """What the contenders have in common.

    Attributes:
        pairs: captions with two objects.
        singles: captions with one.
        caption_seed: they are `held_out_captions(n, caption_seed, objects)`.
        noise_seed: image i is drawn from `torch.Generator().manual_seed(noise_seed * 1_000_000 + i)`.
        steps: inference steps, of contenders that say nothing else.
        guidance: the guidance scale.
        drawings: drawn scenes per caption, for the Frechet distance.
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
        """Singles, then pairs."""
        return [
            *held_out_captions(self.singles, self.caption_seed, objects=1),
            *held_out_captions(self.pairs, self.caption_seed, objects=2),
        ]


@dataclass(frozen=True)
class Drawn:
    """A contender's images, uint8 [captions, 3, 64, 64], and what they cost.

    Attributes:
        strips: the strips that ran, and for how many captions each.
        macs: multiply-accumulates of all images together, in linear and convolution layers.
        macs_total: the same with attention's own products.
    """

    images: torch.Tensor
    strips: dict[str, int]
    macs: int
    macs_total: int


class Judge:
    """Measures images of `settings.captions` against the captions, drawn scenes and the plain pipeline's images."""

    def __init__(self, settings: Settings) -> None:
        self._captions = settings.captions
        self._singles = settings.singles
        self._reader = AttributeReader.load()
        self._of_drawings = self._statistics(drawings(self._captions, settings.drawings, seed=0))
        # What the distance is for perfect images, so few as they are.
        self.floor = self._distance(self._of_drawings, self._statistics(drawings(self._captions, 1, seed=1)))
        self._plain_images: torch.Tensor | None = None

    def set_plain(self, images: torch.Tensor) -> None:
        """The images that the others are compared with."""
        self._plain_images = images
        self._of_plain = self._statistics(images)
        self._plain_right = self._right(images)
        self._plain_likelihood = self._likelihood(images)

    def __call__(self, images: torch.Tensor) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        assert self._plain_images is not None
        pixels = images.float() / 255
        right, likelihood = self._right(images), self._likelihood(images)
        psnr = peak_signal_noise_ratio(
            images.float(), self._plain_images.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        psnr = psnr[psnr.isfinite()]  # the same image to the last bit has none
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
        """1.0 for each image that shows all its caption says, [captions]."""
        return right(self._reader, images.float() / 255, self._captions)

    def _likelihood(self, images: torch.Tensor) -> torch.Tensor:
        """The reader's log-likelihood of all that the caption says, in nats, [captions]."""
        return log_likelihood(self._reader, images.float() / 255, self._captions)

    def _statistics(self, images: torch.Tensor) -> Statistics:
        """Of the reader's features."""
        return Statistics.of(self._reader.features(images.float() / 255))

    def _distance(self, a: Statistics, b: Statistics) -> float:
        return round(frechet_distance(a, b), 4)


def _mean(values: torch.Tensor) -> float:
    return round(float(values.mean()), 4)


def _standard_error(values: torch.Tensor) -> float:
    return round(float(values.std()) / math.sqrt(len(values)), 4) if len(values) > 1 else math.nan


def draw(contender: Contender, settings: Settings) -> Drawn:
    """All of the contender's images. Image i is the same whatever the batch, but for rounding."""
    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
    call |= contender.call
    if contender.options is not None:
        options = dict(contender.options)
        if "cache_dtype" in options:  # by its name: a row of results is JSON
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
    """Multiply-accumulates of a guided step of one image: layers only, and with attention's products."""
    pipe = tgate_compile.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    tgate_compile.optimize(pipe, None, guidance_step=1, backend="eager")
    pipe("a large red circle on a blue background", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    (full,) = tgate_compile.describe(pipe).variants
    return full.macs, full.macs_total


def measure(path: Path, contenders: Sequence[Contender], settings: Settings, images: Path | None = None) -> None:
    """Measure the `contenders` that `path` does not have yet, and write it after each.

    Args:
        path: the results, a JSON file.
        contenders: what to measure; the plain pipeline always, as the others are compared with it.
        settings: what they have in common.
        images: a folder to keep the images in, one file per contender. The plain pipeline's are read from there;
            without them they are made anew.

    Raises:
        SystemExit: the file's settings are others.
    """
    results = _results(path, settings)
    rows: dict[str, Any] = results["rows"]
    plain = CONTENDERS[0]
    missing = [contender for contender in contenders if not _is_in(rows, contender)]
    rows |= {c.name: rows[c.name] | _place(c) for c in CONTENDERS if c.name in rows}
    if not missing:
        logger.info("nothing to do: %s has them all", path)
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
        # In the order of the list; what it has no more comes last.
        results["rows"] = {c.name: rows[c.name] for c in CONTENDERS if c.name in rows} | rows
        _write(path, results)
        logger.info("%s", summary(contender.name, row))


def summary(name: str, row: dict[str, Any]) -> str:
    """One line of the log."""
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
    """All or nothing: an interrupted run leaves the results before."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _environment() -> dict[str, str]:
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return versions | {"tgate_compile": tgate_compile.__version__, "device": "cpu"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results, a JSON file; continued if it is there")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="contenders, in that order; * is anything"
    )
    parser.add_argument("--captions", type=int, default=256, help="captions of two objects")
    parser.add_argument("--singles", type=int, help="captions of one object; half as many by default")
    parser.add_argument("--caption-seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--images", type=Path, help="a folder to keep the images in")
    options = parser.parse_args(arguments)
    by_name = {c.name: c for pattern in options.only for c in CONTENDERS if fnmatch(c.name, pattern)}
    if not by_name:
        parser.error(f"no contender is called {' or '.join(options.only)}; there are: {[c.name for c in CONTENDERS]}")
    singles = max(options.captions // 2, 1) if options.singles is None else options.singles
    settings = Settings(options.captions, singles, options.caption_seed, steps=options.steps)
    measure(options.out, list(by_name.values()), settings, options.images)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
