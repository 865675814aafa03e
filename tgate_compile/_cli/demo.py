"""`tgate-compile demo`: the embedded model under several schedules, in a table and a picture."""

from __future__ import annotations

import json as json_format
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import diffusers
import torch
import typer
from diffusers.callbacks import SDCFGCutoffCallback
from PIL.Image import Image
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table

import tgate_compile
from tgate_compile._arguments import BackendName
from tgate_compile._cli import options
from tgate_compile._cli.console import OUT, make_progress, print_json, print_note, work_of
from tgate_compile._cli.demo_picture import draw_picture, shown_modes
from tgate_compile._cli.loading import MSG_NEVER_GATED, quieten_libraries
from tgate_compile._cli.options import demo_prompts
from tgate_compile._cli.pictures import check_folder
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile._demo.pipeline import load_demo_pipeline
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.comparison.run import psnr

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Key = Literal["plain", "guidance_dropped", "eager", "inductor"]


@dataclass
class Mode:
    """One way to run the pipeline, and what it gave.

    Attributes:
        key: for programs.
        title: for people, short.
        pipe: a pipeline of its own: an optimized denoiser belongs to one pipeline.
        callback: given to each call as `callback_on_step_end`.
        first_seconds: the first call, capture and compilation included.
        seconds: the later calls, one image each.
        images: of the later calls.
    """

    key: Key
    title: str
    pipe: StableDiffusionPipeline
    callback: SDCFGCutoffCallback | None = None
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    @property
    def is_gated(self) -> bool:
        """Whether T-GATE runs."""
        return self.key in ("eager", "inductor")


@dataclass(frozen=True)
class Task:
    """What every mode is asked for."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    gate: int
    seed: int


def make_modes(gate: int, *, compiled: bool) -> list[Mode]:
    """The modes, plain first; with `compiled` the one by Inductor, too."""
    plain = load_demo_pipeline()
    # At the end of step gate - 1, and keeping the cond half: diffusers' own way to stop guidance.
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=gate - 1)
    modes = [
        Mode("plain", "plain", plain),
        Mode("guidance_dropped", "guidance drop", plain, cutoff),
        Mode("eager", "T-GATE eager", _optimized(gate, "eager")),
    ]
    if compiled:
        modes.append(Mode("inductor", "T-GATE compiled", _optimized(gate, "inductor")))
    for mode in modes:
        mode.pipe.set_progress_bar_config(disable=True)
    return modes


def warm_up(mode: Mode, task: Task) -> None:
    """The first call, which captures and compiles; its image is thrown away."""
    _, mode.first_seconds = _run(mode, task, 0)


def measure(mode: Mode, task: Task, index: int) -> None:
    """One image of prompt `index`, timed."""
    image, seconds = _run(mode, task, index)
    mode.images.append(image)
    mode.seconds.append(seconds)


def _optimized(gate: int, backend: BackendName) -> StableDiffusionPipeline:
    return tgate_compile.optimize(load_demo_pipeline(), gate, backend=backend)


def _run(mode: Mode, task: Task, index: int) -> tuple[Image, float]:
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


def saving_by_guidance(rows: Sequence[Row]) -> float | None:
    """Of the time that T-GATE saves uncompiled, the share that dropping guidance alone saves; None if it saves none."""
    seconds = {row.key: row.seconds for row in rows}
    saved = seconds["plain"] - seconds["eager"]
    return (seconds["plain"] - seconds["guidance_dropped"]) / saved if saved > 0 else None


# Two lines each, so that the table fits into 80 columns.
_HEADINGS = (
    "time per\nimage",
    "against\nplain",
    "MACs per\nimage",
    "params\ngated",
    "cache",
    "prompts\nright",
    "PSNR to\nplain",
)


def results_table(results: Results) -> RenderableType:
    """What the demo prints."""
    task = results.task
    count = len(task.prompts)
    table = Table(
        title=f"Prompts: {count}, {task.steps} steps, guidance {task.guidance:g}, gate step {task.gate}",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        table.add_row(*_cells(row, count))
    return Group(table, *sentences(results))


def sentences(results: Results) -> list[str]:
    """What a reader of the table should know, one line each."""
    lines = [
        "Times: median over the prompts, warm, the rows taking turns. "
        "MACs: the denoiser's linear and convolution layers. "
        f"Parameters after the gate; before it {results.rows[0].parameters / 1e6:.2f} M.",
        "Guidance drop: the plain pipeline with guidance up to the gate only, and nothing cached.",
    ]
    first = [f"{row.title} {row.first_call_extra_seconds:.1f} s" for row in results.rows if row.cache_bytes]
    if first:
        lines.append(f"Once, in the first call, to capture the graphs and compile them: {'; '.join(first)}.")
    lines.append(guidance_sentence(results))
    if any(row.key == "inductor" for row in results.rows):
        lines.append("The compiled row holds Inductor's own effect as well, for better or worse.")
    return lines


def guidance_sentence(results: Results) -> str:
    """How much of T-GATE's saving comes from the dropped guidance alone."""
    rows = {row.key: row for row in results.rows}
    plain, dropped, eager = rows["plain"], rows["guidance_dropped"], rows["eager"]
    if not eager.cache_bytes:
        return "Nothing was gated, so nothing is saved."
    work = (plain.macs - dropped.macs) / (plain.macs - eager.macs)
    share = saving_by_guidance(results.rows)
    if share is None:
        return (
            "T-GATE saved no time here: the machine is too busy, or the images are too few. "
            f"Of the MACs that it saves, dropping guidance after the gate already gives {work:.0%}."
        )
    return (
        f"The guidance drop alone gives {share:.0%} of the time that T-GATE (eager) saves, and {work:.0%} of the MACs. "
        "The rest is the cross-attention, and on a model this small also that a graph runs with less Python."
    )


def _cells(row: Row, count: int) -> tuple[str, ...]:
    psnr = "identical" if row.mean_psnr is None else f"{row.mean_psnr:.1f} dB"
    return (
        row.title,
        f"{row.seconds:.3f} s",
        f"{row.speedup:.2f}x",
        f"{row.macs / 1e9:.2f} G",
        f"{row.parameters_gated / 1e6:.2f} M",
        f"{row.cache_bytes / 1e3:.0f} kB" if row.cache_bytes else "",
        f"{sum(row.right)} of {count}",
        "" if row.key == "plain" else psnr,
    )


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and demo.json.")] = Path("tgate-demo"),
    gate_step: Annotated[
        float,
        typer.Option(
            "--gate-step", "-g", parser=options.parse_gate_step, metavar="INT|FRACTION", help=options.GATE_HELP
        ),
    ] = 10,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale.")] = 5.0,
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="How many prompts.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image; the next one's is one more.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also compile with Inductor, which takes a minute or two.")
    ] = True,
    json: options.Json = False,
) -> None:
    """Prompts become images with T-GATE and without, on the embedded model: a picture, and a table of what it saves."""
    check_folder(out)
    gate = Schedule(gate_step).gate(steps)
    if gate >= steps:
        print_note(MSG_NEVER_GATED.format(gate=gate, steps=steps).replace(", or --no-tgate", ""))
    task = Task(tuple(demo_prompts(prompts)), steps, guidance, gate, seed)
    quieten_libraries()
    with make_progress(shown=True) as progress:
        modes = _run_all(progress, task, compiled=compiled)
    results = results_of(modes, task)
    data = results.as_dict()
    picture_path, data_path = out / "demo.png", out / "demo.json"
    draw_picture(results, *shown_modes(modes)).save(picture_path)
    data_path.write_text(json_format.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if json:
        print_json(data)
    else:
        OUT.print(results_table(results))
        OUT.print(f"Picture: {picture_path}\nFigures: {data_path}", soft_wrap=True)


def _run_all(progress: Progress, task: Task, *, compiled: bool) -> Sequence[Mode]:
    loading = progress.add_task("Loading the embedded model", total=1)
    modes = make_modes(task.gate, compiled=compiled)
    progress.advance(loading)
    preparing = progress.add_task("", total=len(modes))
    for mode in modes:
        what = "Compiling (a minute or two)" if mode.key == "inductor" else "Warming up"
        progress.update(preparing, description=f"{what}: {mode.title}")
        warm_up(mode, task)
        progress.advance(preparing)
    progress.update(preparing, description="Warmed up")
    images = progress.add_task("", total=len(task.prompts) * len(modes))
    for index in range(len(task.prompts)):
        # The rows take turns, and in another order each time, so that a busy moment hits none of them alone.
        for turn in range(len(modes)):
            mode = modes[(index + turn) % len(modes)]
            progress.update(images, description=f"Image {index + 1}: {mode.title}")
            measure(mode, task, index)
            progress.advance(images)
    progress.update(images, description="Images made")
    return modes
