"""`tgate-compile generate`: images from a prompt, by any supported checkpoint, with T-GATE or without."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

import tgate_compile
from tgate_compile._cli import options
from tgate_compile._cli import options as schedule_options
from tgate_compile._cli.console import ERR, OUT, make_progress, print_json, print_note, steps_shown
from tgate_compile._cli.loading import Loaded, Settings, load, settings_for
from tgate_compile._cli.pictures import check_targets, coloured, image_paths, save_png
from tgate_compile.methods.method import GRAPH_NAMES
from tgate_compile.methods.schedule import Schedule

MSG_CAPTION = "The embedded model was made for captions of coloured shapes, so this image may show anything: {grammar}"


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to show.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png file, or a folder.")],
    model: options.Model = None,
    model_config: options.ModelConfig = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    gate_step: options.GateStep = None,
    sp_interval: schedule_options.SpInterval = None,
    fi_interval: schedule_options.FiInterval = None,
    warm_up: schedule_options.WarmUp = None,
    deepcache_interval: schedule_options.DeepcacheInterval = None,
    deepcache_branch: schedule_options.DeepcacheBranch = None,
    guidance_step: schedule_options.GuidanceStep = None,
    anchor_weight: schedule_options.AnchorWeight = None,
    schedule: schedule_options.File = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first image; the next one's is one more.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images, in one batch.")] = 1,
    height: options.Height = None,
    width: options.Width = None,
    scheduler: options.Scheduler = None,
    unet: options.Unet = None,
    lora: options.Lora = None,
    backend: Annotated[
        options.Backend, typer.Option(help="eager starts at once; inductor compiles for minutes, for many images.")
    ] = options.Backend.eager,
    keep: options.KeepOption = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    tgate: Annotated[bool, typer.Option("--tgate/--no-tgate", help="Without: the plain pipeline.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: options.Json = False,
) -> None:
    """Make images from a prompt. What is not given is set as the model's family needs it."""
    given = schedule_options.given_options(
        sp_interval=sp_interval,
        fi_interval=fi_interval,
        warm_up=warm_up,
        deepcache_interval=deepcache_interval,
        deepcache_branch=deepcache_branch,
        guidance_step=guidance_step,
        anchor_weight=anchor_weight,
        keep=keep and keep.value,
    )
    gate_given = schedule_options.given_options(gate_step=gate_step)
    from_file = schedule_options.schedule_from(schedule, gate_given | given) if schedule is not None else None
    first_seed = random.randrange(2**31) if seed is None else seed
    seeds = [first_seed + i for i in range(num_images)]
    paths = image_paths(out, seeds)
    check_targets(paths, force=force)

    with ERR.status("Loading the model"):
        loaded = load(
            model, model_config=model_config, device=device, dtype=dtype, scheduler=scheduler, unet=unet, lora=lora
        )
    settings = settings_for(loaded, steps=steps, guidance=guidance, gate_step=gate_step, tgate=tgate and not schedule)
    if loaded.is_embedded:
        _check_caption(prompt)
    # Methods of their own run alone, unless a gate is asked for.
    alone = gate_step is None and not {"guidance_step", "deepcache_interval"}.isdisjoint(given)
    chosen = from_file or Schedule(**{"gate_step": None if alone else settings.gate_step, **given})
    if tgate:
        tgate_compile.optimize(loaded.pipe, schedule=chosen, backend=backend.value)

    call: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width}
    images, seconds = _run(loaded, settings, seeds, {k: v for k, v in call.items() if v is not None}, shown=not json)

    used = {
        "model": loaded.source,
        "pipeline": type(loaded.pipe).__name__,
        "family": loaded.family.name,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "schedule": str(chosen) if tgate else None,
        "gate_step": chosen.gate(settings.steps) if tgate and chosen.gate_step is not None else None,
        "keep": tgate_compile.describe(loaded.pipe).keep if tgate else None,
        "backend": backend.value if tgate else None,
        "scheduler": type(loaded.pipe.scheduler).__name__,
        "lora": lora,
        "unet": unet,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "tgate_compile": tgate_compile.__version__,
    }
    for image, path, own_seed in zip(images, paths, seeds, strict=True):
        save_png(image, path, used | {"seed": own_seed})
    strip = tgate_compile.describe(loaded.pipe).strip if tgate else "F" * settings.steps
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
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
    with make_progress(shown=shown) as progress, steps_shown(loaded.pipe, progress, "Denoising"):
        began = time.perf_counter()
        images = loaded.pipe(
            **loaded.call,
            **call,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
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
    capture = ", capture of the graphs included" if used["schedule"] else ""
    table.add_row("time", f"{seconds:.1f} s for {len(paths)} image{'s' if len(paths) > 1 else ''}{capture}")
    OUT.print(table)
    for path in paths:  # not in the table, which would cut a long one short
        OUT.print(f"written   {path}", soft_wrap=True)
