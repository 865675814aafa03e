"""`evaluate`: what schedules do to a pipeline's images, measured in many ways, over many prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tgate_compile._arguments import AnyPipeline, BackendName, check_pipeline_first
from tgate_compile._errors import ConfigurationError
from tgate_compile.bundle.weights import bit_sums
from tgate_compile.methods.schedule import Schedule
from tgate_compile.pipeline.attach import MSG_ALREADY, attach, denoiser_names, detach
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.pipeline.optimized import state_of
from tgate_compile.study.evaluation.images import Folder, Given, Item, Maker, Share, contenders_of
from tgate_compile.study.evaluation.measure import Instruments, Measurer
from tgate_compile.study.evaluation.result import Evaluation
from tgate_compile.study.tuning.measure import silent
from tgate_compile.study.tuning.request import MSG_PROMPTS, Runs, is_whole, setting_of

logger = logging.getLogger(__name__)

#: Called after each image, and after each contender that is measured: how many are done, of how many, and what.
Progress = Callable[[int, int, str], None]


_VERSIONS = ("tgate_compile", "torch", "diffusers", "python")
_POLL_SECONDS = 0.5
_LOG_SECONDS = 60.0


def evaluate(
    pipe: AnyPipeline,
    schedules: Given,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 25,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    backend: BackendName = "eager",
    keep_latents: bool = True,
    fid_weights: str | Path | None = None,
    fid_reference: str | Path | None = None,
    fid_size: int = 256,
    lpips_weights: str | Path | None = None,
    clip: str | Path | None = None,
    attributes: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Make the images of each prompt by the plain pipeline and by every schedule, and measure them.

    Images go into `folder`, each as soon as it is made; a second call with the same arguments makes those that are
    missing, so that an evaluation can be killed and goes on. More schedules may be added to a folder later.

    Run it by torchrun (or whatever sets RANK and WORLD_SIZE), with the same arguments in every process, and the
    processes share the images; the first one measures, and all return what it has found. See
    `docs/guides/evaluating.md`.

    Args:
        pipe: a plain pipeline, not an optimized one, on the device to use. It is plain again afterwards.
        schedules: what to compare with the plain pipeline: schedules, or numbers of steps of the plain pipeline; a
            mapping gives them labels.
        prompts: what to show.
        folder: for images and numbers.
        seeds: noise for each prompt. Prompt i with seed s is drawn from a generator with seed 1,000,000 s + i.
        num_inference_steps: as for the pipeline's call.
        call: further arguments of the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        batch_size: prompts per call.
        backend: as for `optimize`.
        keep_latents: keep final latents, too, for their drift.
        fid_weights: pytorch-fid's weights of Inception, `pt_inception-2015-12-05-6726825d.pth`. None: that file among
            torch's downloads, if it is there.
        fid_reference: a folder of real images to compute FID to, or an .npz file of their statistics.
        fid_size: images are resized to that many pixels for FID; 256 in the paper.
        lpips_weights: torchvision's weights of AlexNet, `alexnet-owt-7be5be79.pth`. None: as for `fid_weights`.
        clip: a folder with a CLIP model, for CLIP scores.
        attributes: whether to use the attribute reader of the embedded pipeline; None: if it can read the images.
        progress: called after each image of this process and each measured contender.

    Raises:
        ConfigurationError: an argument is wrong, or `folder` has other images.
        UnsupportedModelError: the pipeline takes one of the schedules not at all, or makes no images.
    """
    check_pipeline_first("evaluate", pipe, schedules, prompts, folder)
    if prompts is None:
        raise ConfigurationError(MSG_PROMPTS.format(given=None))
    check_ordinary(pipe, "evaluate()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "evaluate")
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigurationError(f"batch_size must be a whole number, at least 1, but got {batch_size!r}.")
    contenders = contenders_of(schedules, num_inference_steps)
    instruments = Instruments(
        _path(fid_weights), _path(fid_reference), fid_size, _path(lpips_weights), _path(clip), attributes
    )
    instruments.check(prompts)
    share = Share.from_environment()
    names = denoiser_names(pipe)
    if state_of(pipe) is not None:
        raise ConfigurationError(MSG_ALREADY.format(pipeline=type(pipe).__name__))
    runs.calls(pipe)

    @contextmanager
    def gated(pipe: DiffusionPipeline, schedule: Schedule) -> Iterator[None]:
        attach(pipe, dict.fromkeys(names, schedule), backend=backend)
        try:
            yield
        finally:
            detach(pipe)

    for contender in contenders:
        if contender.schedule is not None:
            with gated(pipe, contender.schedule):
                pass  # refuses what can be refused before any work
    settings = _settings(pipe, names, runs, batch_size=batch_size, backend=backend, keep_latents=keep_latents)
    results = Folder(Path(folder))
    results.open({name: value for name, value in settings.items() if name not in _VERSIONS}, contenders)
    items = [Item(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
    batches = [items[at : at + batch_size] for at in range(0, len(items), batch_size)]

    done = 0
    total = 0

    def count(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    maker = Maker(pipe, prompts, runs.call, results, gated, keep_latents=keep_latents, on_image=count)
    missing = {contender: maker.missing(contender, batches, share) for contender in contenders}
    total = sum(map(len, (b for of_one in missing.values() for b in of_one))) + len(contenders) * (share.rank == 0)
    with silent(pipe):
        for contender, of_one in missing.items():
            logger.info("%s: %d of %d batches to make", contender.label, len(of_one), len(batches))
            maker.make(contender, of_one)
    key = _digest({"settings": settings, "contenders": [c.as_dict() | {"label": c.label} for c in contenders]})
    whole = _digest({"images": key, "instruments": instruments.as_dict()})
    if share.rank:
        _wait(lambda: _has_results(results, whole), "the first process")
        return _read_results(results)
    _wait(lambda: all(results.has(c, item) for c in contenders for item in items), "images of other processes")
    if _has_results(results, whole):
        return _read_results(results)
    results.clean()
    measurer = Measurer(results, items, prompts, instruments, pipe.device, contenders[0], _digest(settings))
    rows = []
    for contender in contenders:
        rows.append(measurer.measure(contender))
        count(f"measured {contender.label}")
    protocol = settings | {"instruments": instruments.as_dict(), "images": len(items), **measurer.about}
    evaluation = Evaluation(tuple(rows), dict(measurer.not_measured), protocol, tuple(measurer.remarks), results.path)
    results.write_results(evaluation.as_dict() | {"key": whole})
    return _read_results(results)


def _settings(pipe: DiffusionPipeline, names: Sequence[str], runs: Runs, **others: object) -> dict[str, Any]:
    """All that the images depend on, and the versions, which may change while an evaluation goes on."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _digest(bit_sums(part)) for name, part in parts.items()}
    setting = setting_of(pipe, {name: getattr(pipe, name) for name in names})
    settings = {
        **setting,
        "device": pipe.device.type,
        # diffusers' own notes, underscored, come in another order in each process.
        "scheduler_config": {
            name: _in_words(value) for name, value in pipe.scheduler.config.items() if not name.startswith("_")
        },
        "weights": weights,
        "prompts": list(runs.prompts or ()),
        "seeds": list(runs.seeds),
        "num_inference_steps": runs.num_inference_steps,
        "call": {name: _in_words(value) for name, value in runs.call.items()},
        **others,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _in_words(value: object) -> object:
    """A value as plain data for JSON, which has no infinity; with a digest where it would be long."""
    if torch.is_tensor(value):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"Tensor{list(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, Image.Image):
        return f"Image{list(value.size)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    is_plain = isinstance(value, (str, int, type(None))) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else repr(value)


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _wait(is_there: Callable[[], bool], what: str) -> None:
    """Other processes are not asked, only looked for in the folder: torchrun ends all of them when one fails."""
    logged = time.monotonic()
    while not is_there():
        if time.monotonic() - logged > _LOG_SECONDS:
            logger.info("waiting for %s", what)
            logged = time.monotonic()
        time.sleep(_POLL_SECONDS)


def _has_results(folder: Folder, key: str) -> bool:
    return folder.results.exists() and json.loads(folder.results.read_text(encoding="utf-8")).get("key") == key


def _read_results(folder: Folder) -> Evaluation:
    return Evaluation.from_dict(json.loads(folder.results.read_text(encoding="utf-8")), folder.path)
