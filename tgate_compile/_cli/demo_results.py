"""What the demo's runs come to, as numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import diffusers
import numpy as np
import torch
from PIL.Image import Image

import tgate_compile
from tgate_compile._cli.demo_modes import Mode, Task
from tgate_compile._cli.work import work_of
from tgate_compile._demo.attribute_reader import AttributeReader


@dataclass(frozen=True)
class Row:
    """The figures of one mode.

    Attributes:
        key: for programs.
        title: for people.
        seconds: per image: the median of the warm calls.
        all_seconds: of the warm calls, in the order of the prompts.
        speedup: against plain.
        first_call_extra_seconds: what the first call took longer: capture, and compilation.
        macs: multiply-accumulates per image, in linear and convolution layers of the denoiser.
        parameters: of the denoiser, before the gate.
        parameters_gated: after the gate.
        cache_bytes: what the cache holds after the gate.
        right: for each image whether it shows everything that its prompt names, as the attribute reader sees it.
        accuracy: share of right images, and shares per attribute.
        psnrs: of each image to the plain one in dB; None where they are identical to the bit.
    """

    key: str
    title: str
    seconds: float
    all_seconds: tuple[float, ...]
    speedup: float
    first_call_extra_seconds: float
    macs: int
    parameters: int
    parameters_gated: int
    cache_bytes: int
    right: tuple[bool, ...]
    accuracy: dict[str, float]
    psnrs: tuple[float | None, ...]

    @property
    def mean_psnr(self) -> float | None:
        """Over the images that differ from the plain ones at all; None if there are none."""
        differing = [value for value in self.psnrs if value is not None]
        return mean(differing) if differing else None


@dataclass(frozen=True)
class Results:
    """Everything that the demo measured."""

    task: Task
    rows: tuple[Row, ...]
    strip: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON, with what it was measured on."""
        machine = {
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "diffusers": diffusers.__version__,
            "tgate_compile": tgate_compile.__version__,
        }
        share = saving_by_guidance(self.rows)
        return asdict(self) | {"saving_by_guidance_drop": share, "machine": machine}


def results_of(modes: Sequence[Mode], task: Task) -> Results:
    """The figures of `modes`, which have run all of the task's prompts; the plain one is first."""
    plain, reader = modes[0], AttributeReader.load()
    eager = next(mode for mode in modes if mode.key == "eager")
    description = tgate_compile.describe(eager.pipe)
    graphs = {variant.name: variant for variant in description.variants}
    pruned = graphs.get("pruned", graphs["full"])
    work = work_of(description, "".join("F" if name == "full" else "p" for _, name in description.last_steps))
    macs = {"plain": work.plain, "guidance_dropped": work.guidance_dropped}
    rows = []
    for mode in modes:
        seconds = median(mode.seconds)
        rows.append(
            Row(
                key=mode.key,
                title=mode.title,
                seconds=seconds,
                all_seconds=tuple(mode.seconds),
                speedup=median(plain.seconds) / seconds,
                first_call_extra_seconds=max(mode.first_seconds - seconds, 0.0),
                macs=macs.get(mode.key, work.gated),
                parameters=description.parameters,
                parameters_gated=pruned.parameters if mode.is_gated else description.parameters,
                cache_bytes=pruned.cache_bytes if mode.is_gated and "pruned" in graphs else 0,
                right=tuple(
                    reader.score([image], [prompt])["all"] == 1.0
                    for image, prompt in zip(mode.images, task.prompts, strict=True)
                ),
                accuracy=reader.score(mode.images, task.prompts),
                psnrs=tuple(psnr(one, other) for one, other in zip(plain.images, mode.images, strict=True)),
            )
        )
    return Results(task, tuple(rows), description.strip)


def psnr(one: Image, other: Image) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit images in dB; None if they are identical."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(difference**2))
    return 10 * float(np.log10(255**2 / error)) if error else None


def saving_by_guidance(rows: Sequence[Row]) -> float | None:
    """Of the time that T-GATE saves uncompiled, the share that dropping guidance alone saves; None if it saves none."""
    seconds = {row.key: row.seconds for row in rows}
    saved = seconds["plain"] - seconds["eager"]
    return (seconds["plain"] - seconds["guidance_dropped"]) / saved if saved > 0 else None
