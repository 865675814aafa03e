"""The runs of `tgate-compile demo`: the embedded model in several modes, their figures and the picture."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image, ImageChops, ImageDraw, ImageFont

import tgate_compile
from tgate_compile._cli.console import work_of
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.pipeline import load_demo_pipeline
from tgate_compile._errors import BackendName
from tgate_compile.study.comparison.run import psnr

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: Rows without T-GATE. The keys of the others are the names of their backends.
UNGATED = ("plain", "guidance_dropped")


_TITLES = {
    "eager": "T-GATE eager",
    "inductor": "T-GATE compiled",
    "onnxruntime": "T-GATE ONNX RT",
    "openvino": "T-GATE OpenVINO",
}


@dataclass
class Mode:
    """One way to run the pipeline, and the results.

    Attributes:
        key: identifier for programs.
        title: short name for people.
        pipe: not shared with another optimized mode, since an optimized denoiser belongs to one pipeline.
        callback: passed to each call as `callback_on_step_end`.
        first_seconds: time of the first call, including capture and compilation.
        seconds: times of the later calls, one image each.
        images: images of the later calls.
    """

    key: str
    title: str
    pipe: StableDiffusionPipeline
    callback: SDCFGCutoffCallback | None = None
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    @property
    def is_gated(self) -> bool:
        """Whether T-GATE runs."""
        return self.key not in UNGATED


@dataclass(frozen=True)
class Task:
    """The prompts and settings that are the same in every mode."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    gate: int
    seed: int


def make_modes(gate: int, backends: Sequence[BackendName]) -> list[Mode]:
    """Return the modes: plain first, then T-GATE on each of the backends, the fastest last."""
    plain = load_demo_pipeline()
    # diffusers' own way to stop guidance: at the end of step gate - 1, keeping the cond half.
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    modes = [Mode("plain", "plain", plain), Mode("guidance_dropped", "guidance drop", plain, cutoff)]
    modes += [Mode(backend, _TITLES[backend], _optimized(gate, backend)) for backend in backends]
    for mode in modes:
        mode.pipe.set_progress_bar_config(disable=True)
    return modes


def warm_up(mode: Mode, task: Task) -> None:
    """Run the first call, which captures and compiles, and discard the image."""
    _, mode.first_seconds = _run(mode, task, 0)


def measure(mode: Mode, task: Task, index: int) -> None:
    """Make an image of prompt `index`, and record its time."""
    image, seconds = _run(mode, task, index)
    mode.images.append(image)
    mode.seconds.append(seconds)


def _optimized(gate: int, backend: BackendName) -> StableDiffusionPipeline:
    return tgate_compile.optimize(load_demo_pipeline(), gate, backend=backend)


def _run(mode: Mode, task: Task, index: int) -> tuple[Image.Image, float]:
    options: dict[str, Any] = {}
    if mode.callback is not None:
        options = {
            "callback_on_step_end": mode.callback,
            "callback_on_step_end_tensor_inputs": mode.callback.tensor_inputs,
        }
    began = time.perf_counter()
    result = mode.pipe(
        task.prompts[index],
        num_inference_steps=task.steps,
        guidance_scale=task.guidance,
        generator=torch.Generator().manual_seed(task.seed + index),
        **options,
    )
    return result.images[0], time.perf_counter() - began


#: Smallest saving to report, as a fraction of the plain pipeline's time; smaller ones are lost in noise.
LEAST_SAVED = 0.05


@dataclass(frozen=True)
class Row:
    """The figures of one mode.

    Attributes:
        key: identifier for programs.
        title: name for people.
        seconds: time per image, the median of the warm calls.
        all_seconds: times of the warm calls, in the order of the prompts.
        speedup: speedup over plain.
        first_call_extra_seconds: additional time of the first call, for capture and compilation.
        macs: multiply-accumulates per image, in linear and convolution layers of the denoiser.
        parameters: parameters of the denoiser before the gate.
        parameters_gated: parameters after the gate.
        cache_bytes: size of the cache after the gate.
        right: for each image, whether it shows everything that its prompt names, according to the attribute reader.
        accuracy: share of right images, and shares per attribute.
        psnrs: PSNR of each image to the plain one in dB; None where they are bit-identical.
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
        """The mean PSNR of the images that differ from the plain ones; None if none differs."""
        differing = [value for value in self.psnrs if value is not None]
        return mean(differing) if differing else None


@dataclass(frozen=True)
class Results:
    """Everything that the demo measured."""

    task: Task
    rows: tuple[Row, ...]
    strip: str

    def as_dict(self) -> dict[str, Any]:
        """Return the results and a description of the machine as JSON-compatible data."""
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
    """Return the figures of `modes`, which have run all of the task's prompts; the plain one is first."""
    plain, reader = modes[0], AttributeReader.load()
    eager = next(mode for mode in modes if mode.key == "eager")
    description = tgate_compile.describe(eager.pipe)
    graphs = {variant.name: variant for variant in description.variants}
    pruned = graphs.get("pruned", graphs["full"])
    work = work_of(description, description.strip)
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


def saving_by_guidance(rows: Sequence[Row]) -> float | None:
    """Return the share of the time saved by T-GATE, uncompiled, that dropping guidance alone saves.

    Return None if T-GATE saves nothing, or so little that the share would be noise.
    """
    seconds = {row.key: row.seconds for row in rows}
    saved = seconds["plain"] - seconds["eager"]
    return (seconds["plain"] - seconds["guidance_dropped"]) / saved if saved > LEAST_SAVED * seconds["plain"] else None


TILE = 168
MARGIN = 28
GAP = 14
PROMPT_WIDTH = 250
MAX_ROWS = 12
AMPLIFICATION = 4

_PAPER = "#ffffff"
_INK = "#1a1c20"
_SOFT = "#6a707a"
_FULL = "#2f5d9e"
_PRUNED = "#8fc7a3"
_WRONG = "#b3402e"
_LINE = "#d9dce1"


def draw_picture(results: Results, plain: Mode, gated: Mode) -> Image.Image:
    """Draw the grid, `plain` beside `gated`; both have run all of the task's prompts."""
    prompts = results.task.prompts[:MAX_ROWS]
    head = _draw_head(results)
    width = head.width
    picture = Image.new("RGB", (width, head.height + len(prompts) * (TILE + GAP) + MARGIN - GAP), _PAPER)
    picture.paste(head)
    rows = {row.key: row for row in results.rows}
    for index, prompt in enumerate(prompts):
        top = head.height + index * (TILE + GAP)
        _write_prompt(picture, top, prompt, index, rows[plain.key], rows[gated.key])
        for column, tile in enumerate(_tiles(plain.images[index], gated.images[index])):
            picture.paste(tile, (_left(column), top))
            # Without an outline, white backgrounds would have no visible edge.
            box = (_left(column), top, _left(column) + TILE - 1, top + TILE - 1)
            ImageDraw.Draw(picture).rectangle(box, outline=_LINE)
    return picture


def _tiles(plain: Image.Image, gated: Image.Image) -> list[Image.Image]:
    difference = ImageChops.difference(plain.convert("RGB"), gated.convert("RGB"))
    amplified = difference.point(lambda value: min(value * AMPLIFICATION, 255))
    # Lanczos for the images, which are smooth; nearest for the difference, in which every pixel counts.
    return [
        plain.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS),
        gated.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS),
        amplified.resize((TILE, TILE), Image.Resampling.NEAREST),
    ]


def _draw_head(results: Results) -> Image.Image:
    task = results.task
    head = Image.new("RGB", (_left(3) - GAP + MARGIN, 214), _PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((MARGIN, 24), "The same prompts and seeds, with and without T-GATE", _INK, _font(27))
    times = "    ".join(f"{row.title} {_time(row)}" for row in results.rows if row.key != "guidance_dropped")
    draw.text((MARGIN, 66), times, _INK, _font(18))
    _draw_strip(draw, results.strip, top=102)
    columns = ("plain", "T-GATE", f"difference x {AMPLIFICATION}")
    notes = (f"{task.steps} steps, guidance {task.guidance:g}", f"gate step {task.gate}", "black: the same")
    draw.text((MARGIN, 158), "prompt", _INK, _font(20))
    draw.text((MARGIN, 184), "combinations never trained on", _SOFT, _font(15))
    for column, (heading, note) in enumerate(zip(columns, notes, strict=True)):
        draw.text((_left(column), 158), heading, _INK, _font(20))
        draw.text((_left(column), 184), note, _SOFT, _font(15))
    return head


def _draw_strip(draw: ImageDraw.ImageDraw, strip: str, top: int) -> None:
    """Draw the schedule, a cell per step, with a legend of the two colours."""
    cell = min(16, 460 // len(strip))
    for step, kind in enumerate(strip):
        left = MARGIN + step * cell
        draw.rectangle((left, top, left + max(cell - 3, 1), top + 14), fill=_FULL if kind == "F" else _PRUNED)
    left = MARGIN + len(strip) * cell + 14
    full = strip.count("F")
    for text, colour in ((f"{full} full steps", _FULL), (f"{len(strip) - full} pruned, at half the batch", _PRUNED)):
        draw.rectangle((left, top + 2, left + 11, top + 13), fill=colour)
        draw.text((left + 18, top - 1), text, _SOFT, _font(15))
        left += 18 + int(draw.textlength(text, _font(15))) + 20


def _write_prompt(picture: Image.Image, top: int, prompt: str, index: int, plain: Row, gated: Row) -> None:
    draw = ImageDraw.Draw(picture)
    lines = _wrap(draw, prompt, _font(19), PROMPT_WIDTH)
    line_height = 25
    y = top + (TILE - line_height * len(lines) - 56) // 2
    for line in lines:
        draw.text((MARGIN, y), line, _INK, _font(19))
        y += line_height
    psnr = gated.psnrs[index]
    draw.text((MARGIN, y + 10), "identical" if psnr is None else f"PSNR {psnr:.1f} dB", _SOFT, _font(15))
    verdicts = [
        f"{name} {'right' if row.right[index] else 'wrong'}" for name, row in (("plain", plain), ("T-GATE", gated))
    ]
    colour = _SOFT if plain.right[index] and gated.right[index] else _WRONG
    draw.text((MARGIN, y + 32), "read: " + ", ".join(verdicts), colour, _font(15))


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _time(row: Row) -> str:
    time = f"{row.seconds:.2f} s"
    return time if row.key == "plain" else f"{time} ({row.speedup:.2f}x)"


def _left(column: int) -> int:
    return MARGIN + PROMPT_WIDTH + GAP + column * (TILE + GAP)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def shown_modes(modes: Sequence[Mode]) -> tuple[Mode, Mode]:
    """Return the two modes to draw: plain, and T-GATE on the last of the backends."""
    return modes[0], modes[-1]
