"""`tgate-compile run`: images from prompts with a bundle, without PyTorch."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tgate_compile import __version__
from tgate_compile._cli import options
from tgate_compile._cli.console import (
    ERR,
    OUT,
    check_targets,
    coloured,
    image_paths,
    make_progress,
    print_json,
    save_png,
)
from tgate_compile._errors import check_installed

if TYPE_CHECKING:
    from tgate_compile.runtime import BundlePipeline, Step


def run(
    bundle: Annotated[Path, typer.Argument(help="A folder written by `export --components all`.", show_default=False)],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to show; repeatable, with an image for each.",
            rich_help_panel=options.IMAGE,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png file, or a folder.", rich_help_panel=options.OUTPUT)],
    *,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image,
    seed: options.RandomSeed = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Use this scheduler: ddim, euler, dpm++ or pndm.", show_default="the model's"
        ),
    ] = None,
    gate_step: options.GateStep = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads per operator.", show_default="physical cores")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check all files' hashes first.")] = True,
    sequential: Annotated[bool, typer.Option("--sequential", help="Keep only one graph in memory at a time.")] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Make images with a bundle, using only ONNX Runtime. Options default to the values used in the export."""
    first_seed = random.randrange(2**31) if seed is None else seed
    seeds = [first_seed + i for i in range(len(prompt))]
    paths = image_paths(out, seeds)
    check_installed("pydantic", "onnxruntime", "tokenizers", extra="runtime", what="run")
    check_targets(paths, force=force)
    with ERR.status("Opening the bundle"):
        from tgate_compile.runtime import BundlePipeline

        pipe = BundlePipeline(bundle, threads=threads, verify=verify, sequential=sequential)
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": image.steps,
        "guidance_scale": image.guidance,
        "gate_step": gate_step,
        "height": image.height,
        "width": image.width,
        "scheduler": scheduler,
        "seed": first_seed,
    }
    images, done, seconds = _made(pipe, prompt, call, shown=not json)
    used = {
        "bundle": str(bundle),
        "negative_prompt": negative_prompt,
        "steps": len(done),
        "guidance": pipe.manifest.components.guidance_scale if image.guidance is None else image.guidance,  # type: ignore[union-attr]
        "schedule": str(pipe.schedule),
        "gate_step": gate_step,
        "scheduler": scheduler or pipe.manifest.scheduler.class_name,
        "tgate_compile": __version__,
    }
    for picture, path, text, own_seed in zip(images, paths, prompt, seeds, strict=True):
        save_png(picture, path, used | {"prompt": text, "seed": own_seed})
    strip, times = "".join(step.letter for step in done), _times(done)
    if json:
        results = {"prompts": prompt, "seeds": seeds, "images": [str(path) for path in paths], "strip": strip}
        print_json(used | results | {"seconds": seconds, "seconds_per_step": times})
    else:
        _print_result(used, strip, times, paths, seconds)


def _made(
    pipe: BundlePipeline, prompts: Sequence[str], call: dict[str, Any], *, shown: bool
) -> tuple[list[Any], list[Step], float]:
    done: list[Step] = []
    with make_progress(shown=shown) as progress:
        task = progress.add_task("Denoising", total=None)

        def after(step: Step) -> None:
            done.append(step)
            progress.update(task, total=step.steps, completed=step.number + 1)

        began = time.perf_counter()
        images = pipe(list(prompts), **call, callback=after)
        seconds = time.perf_counter() - began
    assert isinstance(images, list)
    return images, done, seconds


def _times(done: Sequence[Step]) -> dict[str, float]:
    """Return the mean seconds per step of each graph, without the first step if there are others."""
    seconds: dict[str, list[float]] = {}
    for step in done:
        seconds.setdefault(step.graph, []).append(step.seconds)
    return {graph: sum(some[1:] or some) / len(some[1:] or some) for graph, some in seconds.items()}


def _print_result(used: dict[str, Any], strip: str, times: dict[str, float], paths: list[Path], seconds: float) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("bundle", f"{used['bundle']}: {used['schedule']}")
    table.add_row("settings", f"{used['steps']} steps of {used['scheduler']}, guidance {used['guidance']:g}")
    table.add_row("steps", Text.assemble(coloured(strip)))
    table.add_row("per step", ", ".join(f"{1000 * each:.1f} ms {graph}" for graph, each in times.items()))
    table.add_row("time", f"{seconds:.1f} s for {len(paths)} image{'s' if len(paths) > 1 else ''}")
    OUT.print(table)
    for path in paths:  # not in the table, which would truncate long paths
        OUT.print(f"written   {path}", soft_wrap=True)
