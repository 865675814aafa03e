"""`tgate-compile evaluate`: what schedules do to a model's images, over many prompts."""

from __future__ import annotations

import json as json_format
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli import options as prompt_options
from tgate_compile._cli import settings as schedule_options
from tgate_compile._cli.console import OUT, check_folder, check_targets, make_progress, print_json
from tgate_compile._cli.options import embedded_name
from tgate_compile._cli.settings import print_chosen, settings_for
from tgate_compile._errors import ConfigurationError, check_installed
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import load_schedule, read_schedule
from tgate_compile.study.figures import check_figure

if TYPE_CHECKING:
    from tgate_compile.study.evaluation.result import Evaluation

MSG_CONTENDER = (
    '--contender {given!r}: expected the fields of a schedule, such as "gate_step=10 anchor_weight=1.0", or "steps=15" '
    'alone for the plain pipeline in fewer steps; a label may precede them, as in "early: gate_step=5".'
)
MSG_NONE = "Give at least one schedule to compare with the plain pipeline: --contender or --schedule, both repeatable."
MSG_NOT_THERE = "--{option} {given} does not exist. Check the path."
MSG_TWICE = "Two contenders are called {label!r}. Give them labels: --contender 'label: ...'."

_EMBEDDED_PROMPTS = 64
_EMBEDDED: dict[str, Schedule | int] = {
    "T-GATE 10": Schedule(10),
    "T-GATE 10, cond cached": Schedule(10, anchor_weight=1.0),
    "T-GATE 5, cond cached": Schedule(5, anchor_weight=1.0),
    "guidance drop 10": Schedule(None, guidance_step=10),
    "15 steps": 15,
}


def evaluate(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for images and numbers; an existing one is resumed.",
            rich_help_panel=options.OUTPUT,
        ),
    ],
    model: options.Model = None,
    *,
    loading: options.Loading,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            "-c",
            metavar="TEXT",
            help='"gate_step=10 sp_interval=5", "steps=15", "label: gate_step=5"; repeatable.',
            show_default="a few, for the embedded model",
        ),
    ] = None,
    schedule: schedule_options.Files = None,
    prompt: prompt_options.Prompt = None,
    prompts: prompt_options.Prompts = None,
    count: prompt_options.Count = None,
    seeds: prompt_options.Seeds = None,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per call.", rich_help_panel=options.IMAGE)] = 1,
    backend: options.BackendOption = options.EAGER,
    precision: options.PrecisionOption = options.OWN,
    fid_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth.",
            show_default="torch's downloads",
        ),
    ] = None,
    fid_reference: Annotated[
        Path | None, typer.Option(help="Folder of real images, or an .npz file of their statistics.")
    ] = None,
    fid_size: Annotated[int, typer.Option(min=16, help="Side in pixels to which images are resized for FID.")] = 256,
    lpips_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth.", show_default="torch's downloads"),
    ] = None,
    clip: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A CLIP model, for CLIP scores.")] = None,
    latents: Annotated[
        bool, typer.Option("--latents/--no-latents", help="Keep the final latents, to measure their drift.")
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the numbers into this .png, .svg or .pdf file. Needs matplotlib.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure what schedules do to the images, over many prompts. Resumes if interrupted; torchrun splits the work."""
    embedded = embedded_name(model) is not None
    contenders = _contenders(contender or [], schedule or [], embedded=embedded)
    texts = prompt_options.chosen_prompts(prompt, prompts, count, embedded=_EMBEDDED_PROMPTS if embedded else None)
    check_installed("torchmetrics", extra="evaluate", what="evaluate")
    chosen_backend = options.check_backend(backend)
    files = {"fid-weights": fid_weights, "fid-reference": fid_reference, "lpips-weights": lpips_weights, "clip": clip}
    for name, path in files.items():
        if path is not None and not path.exists():
            raise ConfigurationError(MSG_NOT_THERE.format(option=name, given=path))
    check_folder(out)
    if plot is not None:
        check_figure(plot)
        check_targets([plot], force=force)
    from tgate_compile.study.evaluation.images import Share  # PyTorch takes seconds

    first = Share.from_environment().rank == 0
    loaded = replace(loading, device=_own_device(loading.device)).load(model)
    settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=None, tgate=False)
    if first:
        print_chosen(loaded, loading, image, settings)
    call: dict[str, Any] = {**loaded.call, **loaded.guided(settings.guidance), **image.size}
    if negative_prompt is not None:
        call["negative_prompt"] = negative_prompt
    with make_progress(shown=first and not json) as progress:
        task = progress.add_task("plain", total=None)
        evaluation = tgate_compile.evaluate(
            loaded.pipe,
            contenders,
            texts,
            out,
            seeds=seeds or (0,),
            num_inference_steps=settings.steps,
            call=call,
            batch_size=batch_size,
            backend=chosen_backend,
            precision=precision.value,
            keep_latents=latents,
            fid_weights=fid_weights,
            fid_reference=fid_reference,
            fid_size=fid_size,
            lpips_weights=lpips_weights,
            clip=clip,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    if not first:
        return  # only the first process prints the results
    if plot is not None:
        evaluation.plot(plot)
    if json:
        print_json({"model": loaded.source} | evaluation.as_dict())
        return
    _print_evaluation(evaluation)
    for path in (out / "results.json", *([plot] if plot is not None else ())):
        OUT.print(f"written {path}", soft_wrap=True)


def _contenders(given: list[str], files: list[Path], *, embedded: bool) -> dict[str, Schedule | int]:
    found = [_parsed(text) for text in given] + [(path.stem, load_schedule(path)) for path in files]
    if not found:
        if not embedded:
            raise ConfigurationError(MSG_NONE)
        return dict(_EMBEDDED)
    contenders: dict[str, Schedule | int] = {}
    for label, contender in found:
        if label in contenders:
            raise ConfigurationError(MSG_TWICE.format(label=label))
        contenders[label] = contender
    return contenders


def _parsed(text: str) -> tuple[str, Schedule | int]:
    """Return a label, and a schedule or a number of steps."""
    before, colon, after = text.rpartition(":")
    fields: dict[str, Any] = {}
    for word in re.split(r"[\s,]+", after.strip()):
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigurationError(MSG_CONTENDER.format(given=text))
        try:
            fields[name.replace("-", "_")] = json_format.loads(value)
        except ValueError:
            fields[name.replace("-", "_")] = value  # keep=cond
    if set(fields) == {"steps"}:
        contender: Schedule | int = fields["steps"]
        default = f"{contender} steps"
    else:
        contender = read_schedule({"gate_step": None, **fields}, f"--contender {text!r}")
        default = str(contender)
    return before.strip() if colon else default, contender


def _own_device(given: str) -> str:
    """Return the GPU that torchrun has assigned to this process, or `given` without torchrun."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or given not in ("auto", "cuda"):
        return given
    import torch

    if torch.cuda.is_available():
        return f"cuda:{local}"
    return given


def _print_evaluation(evaluation: Evaluation) -> None:
    from tgate_compile.study.evaluation.result import HEADINGS

    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for name in evaluation.shown:
        table.add_column(HEADINGS[name][0], justify="right")
    for row in evaluation.rows:
        table.add_row(row.label, *evaluation.cells(row))
    OUT.print(table)
    for name, reason in evaluation.not_measured.items():
        OUT.print(f"not measured: {name}: {reason}", soft_wrap=True, markup=False)
    for remark in evaluation.remarks:
        OUT.print(remark, soft_wrap=True)
