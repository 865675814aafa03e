"""`evaluate`: measure the effect of schedules on a pipeline's images with many metrics over many prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tgate_compile._errors import BackendName, ConfigurationError, Precision, check_pipeline_first
from tgate_compile.bundle.weights import bit_sums
from tgate_compile.engine.config import AnyPipeline
from tgate_compile.pipeline.attach import MSG_ALREADY, attached, denoiser_names
from tgate_compile.pipeline.modular import check_ordinary
from tgate_compile.pipeline.optimized import state_of
from tgate_compile.study.evaluation.images import Folder, Given, Item, Maker, Share, contenders_of
from tgate_compile.study.evaluation.measure import Instruments, Measurer
from tgate_compile.study.evaluation.result import Evaluation
from tgate_compile.study.tuning.measure import silent
from tgate_compile.study.tuning.request import MSG_PROMPTS, Runs, is_whole, setting_of

logger = logging.getLogger(__name__)

#: Called after each image and each measured contender with the number done, the total, and the contender's label.
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
    precision: Precision = "auto",
    keep_latents: bool = True,
    fid_weights: str | Path | None = None,
    fid_reference: str | Path | None = None,
    fid_size: int = 256,
    lpips_weights: str | Path | None = None,
    clip: str | Path | None = None,
    attributes: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Make images of each prompt with the plain pipeline and with every schedule, and measure them.

    Each image is written to `folder` immediately. A second call with the same arguments only makes the images
    that are missing, so an interrupted evaluation can be resumed. More schedules can be added to a folder later.

    Under torchrun (or another launcher that sets RANK and WORLD_SIZE), with the same arguments in every process, the
    processes share the work of making images. The first process measures them, and all processes return its results.
    See `docs/guides/evaluating.md`.

    Args:
        pipe: a plain pipeline, not an optimized one, on the device to use. It is plain again afterwards.
        schedules: schedules, or numbers of steps of the plain pipeline, to compare with the plain pipeline; pass a
            mapping to label them.
        prompts: the prompts.
        folder: folder for images and results.
        seeds: seeds of the noise for each prompt. Prompt i with seed s uses a generator with seed 1,000,000 s + i.
        num_inference_steps: as for the pipeline's call.
        call: further arguments for the pipeline's call: `{"guidance_scale": 5.0, "height": 512, ...}`.
        batch_size: prompts per call.
        backend: as for `optimize`.
        precision: as for `optimize`. The plain pipeline, with which the images are compared, keeps its own.
        keep_latents: whether to keep the final latents, which are needed to measure drift.
        fid_weights: pytorch-fid's Inception weights, `pt_inception-2015-12-05-6726825d.pth`. None: that file in torch's
            download folder, if present.
        fid_reference: a folder of real images to compute FID against, or an .npz file with their statistics.
        fid_size: size in pixels to which images are resized for FID; 256 in the paper.
        lpips_weights: torchvision's AlexNet weights, `alexnet-owt-7be5be79.pth`. None: as for `fid_weights`.
        clip: a folder with a CLIP model, for CLIP scores.
        attributes: whether to use the attribute reader of the embedded pipeline; None: if it supports the images.
        progress: called after each image made by this process and after each measured contender.

    Raises:
        ConfigurationError: an argument is invalid, or `folder` contains images of another evaluation.
        UnsupportedModelError: the pipeline does not support one of the schedules, or does not make images.
    """
    check_pipeline_first("evaluate", pipe, schedules, prompts, folder)
    if prompts is None:
        raise ConfigurationError(MSG_PROMPTS.format(given=None))
    check_ordinary(pipe, "evaluate()")
    runs = Runs(prompts, num_inference_steps, seeds, {} if call is None else call, "evaluate")
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigurationError(f"batch_size must be an integer of at least 1, but got {batch_size!r}.")
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

    for contender in contenders:
        if contender.schedule is not None:
            with attached(pipe, contender.schedule, names, backend=backend, precision=precision):
                pass  # report errors before any work is done
    # Folders written before there was a choice have no entry for it.
    chosen = {} if precision == "auto" else {"precision": precision}
    settings = _settings(pipe, names, runs, batch_size=batch_size, backend=backend, keep_latents=keep_latents, **chosen)
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

    maker = Maker(
        pipe, prompts, runs.call, results, names, backend, precision, keep_latents=keep_latents, on_image=count
    )
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
    _wait(lambda: all(results.has(c, item) for c in contenders for item in items), "the images of other processes")
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
    """Return everything the images depend on, and versions, which may change before an evaluation is resumed."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _digest(bit_sums(part)) for name, part in parts.items()}
    setting = setting_of(pipe, {name: getattr(pipe, name) for name in names})
    settings = {
        **setting,
        "device": pipe.device.type,
        # Skip diffusers' private entries, whose order differs between processes.
        "scheduler_config": {
            name: _as_plain_data(value) for name, value in pipe.scheduler.config.items() if not name.startswith("_")
        },
        "weights": weights,
        "prompts": list(runs.prompts or ()),
        "seeds": list(runs.seeds),
        "num_inference_steps": runs.num_inference_steps,
        "call": {name: _as_plain_data(value) for name, value in runs.call.items()},
        **others,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _as_plain_data(value: object) -> object:
    """Return `value` as plain data for JSON, with a digest for tensors and images; infinities become text."""
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
    """Poll the folder until `is_there` returns true.

    Processes do not communicate in any other way; if one fails, torchrun ends all of them.
    """
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
