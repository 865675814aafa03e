"""Repeat the paper's tables on the embedded models: gates, steps, schedulers and methods, over several seeds.

    python benchmarks/findings.py --out docs/results/findings.json
    python benchmarks/findings_report.py docs/results/findings.json --page docs/evidence/findings.md

`findings_plan.py` defines what is measured. The images are made by `tgate_compile.evaluate`, which stores each one in
`--images`, so the same command resumes an interrupted run. The images of each seed are measured separately: the
fraction that show everything in their captions, PSNR to the plain pipeline's images, and the Frechet distance of the
attribute reader's features to drawn scenes of the same captions. The results contain mean and standard deviation over
the seeds.

The results are written after each setting. Several processes can run at the same time with different `--only`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from findings_plan import CAPTION_SEED, PAIRS, SCHEDULERS, SEEDS, SETTINGS, SINGLES, Setting

import tgate_compile
from tgate_compile._demo import demo_variant
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.captions import held_out_captions
from tgate_compile.study.bench.measure import machine_of
from tgate_compile.study.evaluation.features import Statistics, frechet_distance, pixels_of
from tgate_compile.study.evaluation.images import Contender, Folder, Item, contenders_of, write_json
from tgate_compile.study.evaluation.measure import DRAWINGS, drawings, right
from tgate_compile.study.tuning.measure import relative_distances

logger = logging.getLogger(__name__)

BATCH = 32


def captions() -> list[str]:
    """Return the captions with one object, followed by those with two."""
    return [
        *held_out_captions(SINGLES, CAPTION_SEED, objects=1),
        *held_out_captions(PAIRS, CAPTION_SEED, objects=2),
    ]


def pipeline(setting: Setting) -> Any:
    """Return the plain pipeline of a setting."""
    pipe: Any = tgate_compile.load_demo_pipeline(setting.model)
    pipe.set_progress_bar_config(disable=True)
    if setting.scheduler != "own":
        scheduler, options = SCHEDULERS[setting.scheduler]
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def call_of(setting: Setting) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, except for prompt, noise and steps."""
    variant = demo_variant(setting.model)
    return {"guidance_scale": variant.guidance, **variant.call}


def model_of(setting: Setting) -> dict[str, Any]:
    """Return parameters and multiply-accumulates of the model's graphs.

    Multiply-accumulates are those of one step of one image, in linear and convolution layers.
    """
    pipe = pipeline(Setting(setting.model, setting.steps))
    tgate_compile.optimize(pipe, gate_step=1, backend="eager")
    pipe(captions()[0], num_inference_steps=2, output_type="latent", **call_of(setting))
    by_name = {variant.name: variant for variant in tgate_compile.describe(pipe).variants}
    return {
        "pipeline": demo_variant(setting.model).pipeline,
        "guidance_scale": demo_variant(setting.model).guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "parameters": by_name["full"].parameters,
        "parameters_pruned": by_name["pruned"].parameters,
        "full_step_macs": by_name["full"].macs,
        "pruned_step_macs": by_name["pruned"].macs,
    }


class Judge:
    """Measure the images of a contender, for each seed.

    Args:
        captions: the captions, those with one object first.
        singles: number of captions with one object.
        seeds: the seeds of the noise.
    """

    def __init__(self, captions: Sequence[str], singles: int, seeds: Sequence[int]) -> None:
        self._captions = captions
        self._singles = singles
        self._seeds = seeds
        self._reader = AttributeReader.load()
        self._drawn = self._statistics(drawings(self._captions, DRAWINGS, seed=0).float() / 255)
        # The distance of the same number of perfect images.
        self.floor = [
            frechet_distance(self._drawn, self._statistics(drawings(self._captions, 1, seed=1 + seed).float() / 255))
            for seed in seeds
        ]

    def __call__(self, folder: Folder, contender: Contender, plain: Contender) -> dict[str, Any]:
        """Return the measures: mean, standard deviation and the value per seed.

        Accuracies are in %, PSNR is in dB, and the drift is only measured if the final latents were kept.
        """
        by_seed: dict[str, list[float]] = {name: [] for name in ("pairs", "singles", "psnr", "drift", "frechet")}
        lost = gained = 0
        for seed in self._seeds:
            pixels, of_plain = (self._pixels(folder, c, seed) for c in (contender, plain))
            is_right, plain_right = (right(self._reader, x, self._captions) for x in (pixels, of_plain))
            by_seed["singles"].append(100 * float(is_right[: self._singles].mean()))
            by_seed["pairs"].append(100 * float(is_right[self._singles :].mean()))
            by_seed["frechet"].append(frechet_distance(self._statistics(pixels), self._drawn))
            errors = (pixels - of_plain).double().square().mean((1, 2, 3))
            if contender != plain:
                by_seed["psnr"].append(float((-10 * errors[errors > 0].log10()).mean()))
                latents, reference = (self._latents(folder, c, seed) for c in (contender, plain))
                if latents is not None and reference is not None:
                    by_seed["drift"].append(statistics.mean(relative_distances(latents, reference)))
            lost += int((is_right < plain_right).sum())
            gained += int((is_right > plain_right).sum())
        measures = {name: spread(values) for name, values in by_seed.items() if values}
        return measures | {"lost": lost, "gained": gained}

    def _pixels(self, folder: Folder, contender: Contender, seed: int) -> torch.Tensor:
        return pixels_of([folder.load(contender, Item(i, seed)) for i in range(len(self._captions))])

    def _latents(self, folder: Folder, contender: Contender, seed: int) -> torch.Tensor | None:
        latents = [folder.load_latents(contender, Item(i, seed)) for i in range(len(self._captions))]
        kept = [one for one in latents if one is not None]
        return torch.stack(kept) if len(kept) == len(latents) else None

    def _statistics(self, pixels: torch.Tensor) -> Statistics:
        return Statistics.of(self._reader.features(pixels))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and all values, one per seed."""
    assert all(map(math.isfinite, values))
    return {
        "mean": round(statistics.mean(values), 4),
        "sd": round(statistics.stdev(values), 4),
        "seeds": [round(value, 4) for value in values],
    }


def measure(setting: Setting, images: Path, judge: Judge) -> dict[str, Any]:
    """Return the results of a setting as plain data."""
    folder = images / setting.name.replace(", ", "-").replace(" ", "-").lower()

    def progress(at: int, total: int, what: str) -> None:
        if at % BATCH == 0 or at == total:
            logger.info("%s: %d of %d, %s", setting.name, at, total, what)

    evaluation = tgate_compile.evaluate(
        pipeline(setting),
        setting.contenders,
        captions(),
        folder,
        seeds=SEEDS,
        num_inference_steps=setting.steps,
        call=call_of(setting),
        batch_size=BATCH,
        keep_latents=False,
        progress=progress,
    )
    plain, *others = contenders_of(setting.contenders, setting.steps)
    rows: dict[str, Any] = {}
    for contender in (plain, *others):
        row = evaluation[contender.label]
        rows[contender.label] = {
            "steps": contender.steps,
            "schedule": contender.as_dict()["schedule"],
            "strips": dict(row.strips),
            "cost": round(float(row.measures["cost"] or 0.0), 5),
            **judge(Folder(folder), contender, plain),
        }
    kept = ("scheduler", "scheduler_config", "weights")
    return {
        "model": setting.model,
        "steps": setting.steps,
        **{name: evaluation.protocol[name] for name in kept},
        "rows": rows,
    }


def write(path: Path, name: str, result: Mapping[str, Any], model: Mapping[str, Any], judge: Judge) -> None:
    """Add the results of a setting to the file."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}, "settings": {}}
    settings = {**data["settings"], name: dict(result)}
    write_json(
        path,
        {
            "command": "python benchmarks/findings.py --out docs/results/findings.json",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine_of(torch.device("cpu")),
            "images": {
                "singles": SINGLES,
                "pairs": PAIRS,
                "caption_seed": CAPTION_SEED,
                "seeds": list(SEEDS),
                "each": SINGLES + PAIRS,
                "of_pairs": PAIRS * len(SEEDS),
                "of_singles": SINGLES * len(SEEDS),
                "total": (SINGLES + PAIRS) * len(SEEDS),
            },
            "frechet_floor": spread(judge.floor),
            "models": {**data["models"], result["model"]: dict(model)},
            "settings": {s.name: settings[s.name] for s in SETTINGS if s.name in settings},
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to add the results to")
    parser.add_argument("--images", type=Path, default=Path("build/findings"), help="folder for the images")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="SETTING", help="settings to measure, in this order; may contain *"
    )
    options = parser.parse_args(arguments)
    chosen = {s.name: s for pattern in options.only for s in SETTINGS if fnmatch(s.name, pattern)}
    if not chosen:
        parser.error(f"no setting matches {' or '.join(options.only)}; choose from {[s.name for s in SETTINGS]}")
    judge = Judge(captions(), SINGLES, SEEDS)
    for setting in chosen.values():
        result = measure(setting, options.images, judge)
        write(options.out, setting.name, result, model_of(setting), judge)
        logger.info("%s: done", setting.name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
