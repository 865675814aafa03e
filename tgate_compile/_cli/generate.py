"""`tgate-compile generate`: images from a prompt with any supported checkpoint, with or without T-GATE."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli.console import (
    OUT,
    check_targets,
    coloured,
    image_paths,
    make_progress,
    print_json,
    print_note,
    save_png,
    steps_shown,
)
from tgate_compile._cli.settings import ScheduleOptions, Settings, chosen_for, print_chosen, settings_for
from tgate_compile._errors import BackendName
from tgate_compile.methods.method import GRAPH_NAMES

if TYPE_CHECKING:
    from tgate_compile._cli.loading import Loaded

MSG_CAPTION = (
    "The embedded model was trained on captions of coloured shapes, so this image may show anything: {grammar}"
)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to show.", rich_help_panel=options.IMAGE)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png file, or a folder.", rich_help_panel=options.OUTPUT)],
    model: options.Model = None,
    *,
    loading: options.Loading,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image,
    seed: options.RandomSeed = None,
    num_images: options.NumImages = 1,
    schedule: ScheduleOptions,
    tgate: Annotated[bool, typer.Option("--tgate/--no-tgate", help="--no-tgate runs the plain pipeline.")] = True,
    backend: options.BackendForOne = None,
    precision: options.PrecisionOption = options.OWN,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Make images from a prompt. Options that are not given get the defaults of the model's family."""
    backend_name = None if backend is None else options.check_backend(backend)
    first_seed = random.randrange(2**31) if seed is None else seed
    seeds = [first_seed + i for i in range(num_images)]
    paths = image_paths(out, seeds)
    check_targets(paths, force=force)

    loaded = loading.load(model)
    if loaded.is_embedded:
        _check_caption(prompt)
    if tgate:
        settings, chosen = chosen_for(loaded, loading, image, schedule, shown=not json)
        # The embedded models make an image in less time than another runtime needs to compile them.
        default: BackendName = "eager" if loaded.is_embedded else "auto"
        tgate_compile.optimize(loaded.pipe, schedule=chosen, backend=backend_name or default, precision=precision.value)
    else:
        settings = settings_for(loaded, steps=image.steps, guidance=image.guidance, gate_step=None, tgate=False)
        chosen = None
        print_chosen(loaded, loading, image, settings)

    call: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, **image.size}
    images, seconds = _run(loaded, settings, seeds, {k: v for k, v in call.items() if v is not None}, shown=not json)

    described = tgate_compile.describe(loaded.pipe) if chosen is not None else None
    used = {
        "model": loaded.source,
        "pipeline": type(loaded.pipe).__name__,
        "family": loaded.family.name,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "schedule": None if chosen is None else str(chosen),
        "gate_step": None if chosen is None or chosen.gate_step is None else chosen.gate(settings.steps),
        "keep": None if described is None else described.keep,
        "backend": None if described is None else ", ".join(described.served_by) or described.backend,
        "scheduler": type(loaded.pipe.scheduler).__name__,
        "lora": loading.lora,
        "unet": loading.unet,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "precision": precision.value,
        "tgate_compile": tgate_compile.__version__,
    }
    for picture, path, own_seed in zip(images, paths, seeds, strict=True):
        save_png(picture, path, used | {"seed": own_seed})
    strip = "F" * settings.steps if described is None else described.strip
    if json:
        print_json(used | {"seeds": seeds, "images": [str(path) for path in paths], "seconds": seconds, "strip": strip})
    else:
        _print_result(used, strip, paths, seconds)


def _check_caption(prompt: str) -> None:
    from tgate_compile._demo.captions import parse_caption

    try:
        parse_caption(prompt)
    except ValueError as error:
        print_note(MSG_CAPTION.format(grammar=error))


def _run(
    loaded: Loaded, settings: Settings, seeds: list[int], call: dict[str, Any], *, shown: bool
) -> tuple[list[Any], float]:
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
    with make_progress(shown=shown) as progress, steps_shown(loaded.pipe, progress, "Denoising"):
        began = time.perf_counter()
        images = loaded.pipe(
            **{**loaded.call, **call, **loaded.guided(settings.guidance)},
            num_inference_steps=settings.steps,
            num_images_per_prompt=len(seeds),
            generator=generators,
        ).images
        return images, time.perf_counter() - began


def _print_result(used: dict[str, Any], strip: str, paths: list[Path], seconds: float) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{used['model']} ({used['family']}), {used['device']}, {used['dtype']}")
    gate = f"{used['schedule']}, backend {used['backend']}" if used["schedule"] else "without T-GATE"
    table.add_row("settings", f"{used['steps']} steps of {used['scheduler']}, guidance {used['guidance']:g}, {gate}")
    counted = ", ".join(f"{count} {GRAPH_NAMES[letter]}" for letter, count in Counter(strip.upper()).items())
    table.add_row("steps", Text.assemble(coloured(strip), f"  {counted}"))
    capture = ", including the capture of the graphs" if used["schedule"] else ""
    table.add_row("time", f"{seconds:.1f} s for {len(paths)} image{'s' if len(paths) > 1 else ''}{capture}")
    OUT.print(table)
    for path in paths:  # not in the table, which would truncate long paths
        OUT.print(f"written   {path}", soft_wrap=True)
